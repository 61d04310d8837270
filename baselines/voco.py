"""VoCo-LLaMA: compress a picture into the KV cache of a repeated ``<voco>`` token.

From spec abstractive 2. Plain next-token cross-entropy through the bottleneck mask; no teacher.
Decisions of its register: VoCo's prompt normalisation (V1); the KV cache of everything in front
of the text is evicted, as the paper describes and the released code intends (2.4).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from etcbench.bottleneck import Bottleneck
from etcbench.errors import UsageError
from etcbench.released import LLAVA, TOWER, VOCABULARY, KeyMap

LLAMA_WORDS = 32_000  # VoCo's token is one more


def _token_apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cut the compressed token, which is the last, off the vocabulary; the head never reads it."""
    words = {key: value for key, value in state.items() if key.endswith(VOCABULARY)}
    if any(len(value) == LLAMA_WORDS for value in words.values()):
        raise UsageError(
            f"the vocabulary has LLaMA's {LLAMA_WORDS} words and none for VoCo's token: this is "
            "a LLaVA without compression, for --method full"
        )
    parted = {**state, **{key: value[:-1] for key, value in words.items()}}
    if "model.embed_tokens.weight" in state:
        parted["voco"] = state["model.embed_tokens.weight"][-1:]
    return parted


@dataclass(eq=False)
class VoCo(Bottleneck):
    """One learned embedding, repeated ``tokens`` times (one vocabulary entry in the original)."""

    released: ClassVar[KeyMap] = KeyMap(
        {"voco": "compressor.tokens", **LLAVA.rules}, optional=(TOWER,), before=_token_apart
    )

    @property
    def rows(self) -> int:
        """One embedding serves every learned token."""
        return 1


METHOD = VoCo
