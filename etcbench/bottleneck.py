"""Learned tokens as the only route from picture to text: the mechanism of VoCo-LLaMA and ETC.

The sequence is prefix, visual tokens V, M learned tokens Z, text T; T may look at Z but not at V.
After the prefix is prefilled everything but Z leaves the KV cache, so a picture costs M cache
entries, and they serve any number of questions (spec abstractive 1.4, 1.5, 2.2-2.4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from etcbench.compressor import Compressor, ModelSpec, PromptLayout
from etcbench.errors import UsageError
from etcbench.selection import Kind, Layout, Selection


@dataclass(eq=False)
class Bottleneck(Compressor):
    """Learned tokens behind the picture, and the mask that makes them a bottleneck.

    Parameters
    ----------
    prompt : {"image_first", "standard", "marker_first"}, optional
        VoCo's order and normalisation of the prompt, which only LLaVA's template has (register
        V1), the backbone's own template, or that with the learned tokens behind the marker that
        ends a picture instead of in front of it; default: VoCo's where there is one.
    keep_prefix : bool, optional
        Whether text may also see the text in front of the picture; default (register E9): hidden
        on LLaVA, visible on others, whose template opens the user's turn in front of the picture.
    keep_bos : bool
        Whether text may see the very first token although the rest of the prefix is hidden.
    z_t_index : {"next_pos", "image_t", "0"}
        Time index of the learned tokens where positions have three axes (register E10): the next
        free position behind the picture, the picture's own, or 0. Height and width count on.
    """

    trained: ClassVar[bool] = True

    prompt: PromptLayout | None = None
    keep_prefix: bool | None = None
    keep_bos: bool = False
    z_t_index: Literal["next_pos", "image_t", "0"] = "next_pos"

    def prepare(self, spec: ModelSpec) -> None:
        """Settle what depends on the backbone; create the learned embeddings, (rows, hidden)."""
        of_llava = spec.family == "llava"
        self.prompt = self.prompt or ("image_first" if of_llava else "standard")
        if self.prompt == "image_first" and not of_llava:
            raise UsageError(
                f"{self.name()}: {spec.name} has no image_first prompt; leave prompt out"
            )
        if self.prompt == "marker_first" and of_llava:
            raise UsageError(
                f"{self.name()}: {spec.name} has no marker behind the picture; leave prompt out"
            )
        if self.z_t_index != "next_pos" and spec.planes == 1:
            raise UsageError(f"{self.name()}: {spec.name} has no time axis; leave z_t_index out")
        if self.keep_prefix is None:
            self.keep_prefix = not of_llava
        self.parameters = nn.ParameterDict(
            {"tokens": nn.Parameter(torch.randn(self.rows, spec.hidden) * 0.02)}
        )

    @property
    def rows(self) -> int:
        """Distinct learned embeddings."""
        assert self.budget is not None
        return self.budget.tokens

    @property
    def module(self) -> nn.Module:
        """The learned embeddings."""
        return self.parameters

    @property
    def prompt_layout(self) -> PromptLayout:
        """Order of the prompt's parts."""
        return self.prompt or "standard"

    def schedule(self, visual_tokens: int, layers: int) -> list[int]:
        """Every layer prefills all visual tokens; only the learned ones stay in the cache."""
        return [visual_tokens] * layers

    def learned_tokens(self) -> Tensor:
        """Embeddings of Z, shape (M, hidden)."""
        assert self.budget is not None
        tokens: Tensor = self.parameters["tokens"]
        return tokens.expand(self.budget.tokens, -1)

    def number(self, layout: Layout) -> Tensor | None:
        """Move the learned tokens in time, where ``z_t_index`` says so."""
        learned = layout.is_kind(Kind.LEARNED)
        if self.z_t_index == "next_pos" or not learned.any():
            return None
        time = layout.positions[0]
        moved = torch.zeros_like(time)
        if self.z_t_index == "image_t":
            shown = layout.is_kind(Kind.VISUAL)
            moved = time.masked_fill(~shown, -1).amax(-1, keepdim=True).expand_as(time)
        positions = layout.positions.clone()
        positions[0] = torch.where(learned, moved, time)
        return positions

    def attends(self, query: Layout, key: Layout) -> Tensor | None:
        """Hide V, and by default the prefix, from the text behind Z."""
        behind = query.is_kind(Kind.SUFFIX)
        has_learned = key.is_kind(Kind.LEARNED).any(-1)
        if not has_learned.any() or not behind.any():
            return None
        hidden = self._hidden(key) & has_learned[:, None]
        return ~(behind[:, :, None] & hidden[:, None, :])

    def evict(self, layout: Layout) -> Selection | None:
        """Keep what text may see."""
        if not layout.is_kind(Kind.LEARNED).any():
            return None
        return Selection.from_mask(layout.valid & ~self._hidden(layout))

    def _hidden(self, layout: Layout) -> Tensor:
        visual, prefix = layout.is_kind(Kind.VISUAL), layout.is_kind(Kind.PREFIX)
        # What stands between picture and Z has seen the picture: it would be a way around Z.
        informed = prefix & (visual.cumsum(1) > 0)
        if self.keep_prefix:
            return visual | informed
        if self.keep_bos:
            prefix = prefix & (layout.positions.amax(0) > 0)
        return visual | informed | prefix
