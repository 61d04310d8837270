"""How many visual tokens a method may use, and the shape of the model that it is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from etcbench.errors import BudgetError, UsageError


@dataclass(frozen=True)
class Budget:
    """How many visual tokens a method may use.

    Attributes
    ----------
    tokens : int
        The number asked for.
    counted : {"input", "kept"}
        ``"input"``: tokens entering the language model for methods in front of it, the input
        count averaged over the layers for methods inside it (spec selective 1.3). ``"kept"``:
        what is left after the last drop.
    """

    tokens: int
    counted: Literal["input", "kept"] = "input"

    def __str__(self) -> str:
        return str(self.tokens) if self.counted == "input" else f"kept:{self.tokens}"

    def of(self, visual_tokens: int) -> int:
        """Tokens that are left of so many: all of them where the budget is larger."""
        return min(self.tokens, visual_tokens)

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read ``"64"`` or ``"kept:64"``.

        Raises
        ------
        UsageError
            If the text is not a positive whole number of tokens.
        """
        counted, _, number = text.strip().rpartition(":")
        if counted not in ("", "input", "kept") or not number.lstrip("-").isdigit():
            raise UsageError(f"--tokens {text!r} is not a budget; write 64 or kept:64")
        if int(number) < 1:
            raise UsageError(f"--tokens {text!r}: a budget is at least 1 token")
        return cls(int(number), "kept" if counted == "kept" else "input")


@dataclass(frozen=True)
class ModelSpec:
    """The shape of a backbone, as far as compressors and cost models need it.

    Attributes
    ----------
    name, family : str
        Name for tables; backbone family (``"llava"``, ``"qwen3_vl"``).
    layers, hidden, heads, kv_heads, head_dim, mlp : int
        Decoder: depth, width, query heads, key/value heads, head size, MLP inner width.
    visual_tokens : int or None
        Visual tokens of one picture; None where the number depends on the picture.
    grid : tuple of int or None
        Raster (rows, columns) of those tokens.
    tower_layers, tower_hidden, tower_heads : int
        Vision tower: depth, width, heads.
    has_cls : bool
        Whether the tower's sequence starts with a CLS token.
    planes : int
        Rotary position planes: 1, or 3 for M-RoPE.
    projected : bool
        Whether the tower's features have the decoder's width because the tower itself projects.
    taps : int
        DeepStack features of each visual token.
    tiles : int
        Most pieces that a picture is cut into, the whole included; the tower sees each alone.
    """

    name: str
    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    visual_tokens: int | None
    grid: tuple[int, int] | None
    tower_layers: int
    tower_hidden: int
    tower_heads: int
    has_cls: bool
    planes: int = 1
    projected: bool = False
    taps: int = 0
    tiles: int = 1

    @property
    def feature_width(self) -> int:
        """Width of the tower features that a compressor sees."""
        return self.hidden if self.projected else self.tower_hidden

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that one token leaves in the KV cache, all layers together."""
        return 2 * self.kv_heads * self.head_dim * self.layers


def check_within(budget: Budget, spec: ModelSpec) -> None:
    """Refuse a budget above the number of visual tokens of a backbone that has a fixed number."""
    if spec.visual_tokens is not None and budget.tokens > spec.visual_tokens:
        raise BudgetError(
            f"--tokens {budget}: {spec.name} has only {spec.visual_tokens} visual tokens; "
            f"ask for 1 to {spec.visual_tokens}"
        )
