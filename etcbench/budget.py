"""How many visual tokens a method may use, and the shape of the model that it is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

from etcbench.errors import BudgetError, UsageError

if TYPE_CHECKING:
    from etcbench.compressor import Compressor

NOMINAL = 576  # visual tokens of LLaVA-1.5, by which published budgets are named
WRITTEN = "write 64, kept:64 or 1/9 (a share of each picture's own tokens)"


@dataclass(frozen=True)
class Budget:
    """How many visual tokens a method may use.

    Attributes
    ----------
    tokens : int
        The number asked for; of a share, what it is of `NOMINAL` tokens, by which it is sorted.
        What a picture gets is asked of `at` or `of`.
    counted : {"input", "kept"}
        ``"input"``: tokens entering the language model for methods in front of it, the input
        count averaged over the layers for methods inside it (spec selective 1.3). ``"kept"``:
        what is left after the last drop.
    share : Fraction or None
        Part of each picture's own tokens; None for a number that is the same for every picture.
    """

    tokens: int
    counted: Literal["input", "kept"] = "input"
    share: Fraction | None = None

    def __str__(self) -> str:
        asked = str(self.tokens) if self.share is None else _written(self.share)
        return asked if self.counted == "input" else f"kept:{asked}"

    @classmethod
    def part(cls, share: Fraction, counted: Literal["input", "kept"] = "input") -> Budget:
        """Ask for a share of each picture's own tokens."""
        return cls(max(round(share * NOMINAL), 1), counted, share)

    def at(self, visual_tokens: int, pictures: int = 1) -> Budget:
        """Give the number for so many visual tokens in so many pictures, at least one for each."""
        if self.share is None:
            return Budget(self.tokens * pictures, self.counted)
        return Budget(max(round(self.share * visual_tokens), pictures), self.counted)

    def of(self, visual_tokens: int, pictures: int = 1) -> int:
        """Tokens that are left of so many: all of them where the budget is larger."""
        return min(self.at(visual_tokens, pictures).tokens, visual_tokens)

    def on(self, spec: ModelSpec) -> Budget:
        """Make a number of a share where every picture has as many tokens."""
        return self if spec.visual_tokens is None else self.at(spec.visual_tokens)

    def checked_at(self, spec: ModelSpec) -> int | None:
        """Tokens of the picture on which to check whether a method can serve the budget.

        None where a number may fit one picture and not the next; a share that a method cannot
        make of `NOMINAL` tokens it makes of hardly any picture.
        """
        return NOMINAL if self.share and spec.visual_tokens is None else spec.visual_tokens

    def alike(self, tokens: int, visual_tokens: int) -> str:
        """Write another budget in the way of this one: as a number, or as a share."""
        return str(tokens) if self.share is None else _written(Fraction(tokens, visual_tokens))

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read ``"64"``, ``"kept:64"``, ``"1/9"`` or ``"kept:1/9"``.

        Raises
        ------
        UsageError
            If the text is neither a positive whole number of tokens nor a share up to 1/1.
        """
        before, _, asked = text.strip().rpartition(":")
        number, slash, whole = asked.partition("/")
        digits = number.lstrip("-").isdigit() and (not slash or whole.isdigit())
        if before not in ("", "input", "kept") or not digits:
            raise UsageError(f"--tokens {text!r} is not a budget; {WRITTEN}")
        counted: Literal["input", "kept"] = "kept" if before == "kept" else "input"
        if slash and not 0 < int(number) <= int(whole):
            raise UsageError(f"--tokens {text!r}: a share is above 0 and at most 1/1")
        if int(number) < 1:
            raise UsageError(f"--tokens {text!r}: a budget is at least 1 token")
        if slash:
            return cls.part(Fraction(int(number), int(whole)), counted)
        return cls(int(number), counted)


def _written(share: Fraction) -> str:
    """Write a share so that it is read as one: all tokens are 1/1, and 1 is a single token."""
    return f"{share.numerator}/{share.denominator}"


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


def settle(budget: Budget, spec: ModelSpec, kind: type[Compressor]) -> Budget:
    """Make a number of a share where the backbone allows, else see that a method can serve it.

    Raises
    ------
    BudgetError
        If each picture would get its own number of tokens from a method that learns a fixed one.
    """
    found = budget.on(spec)
    # Weights that serve every budget do so by ranking, unless they make the tokens themselves.
    if found.share is not None and kind.trained and (kind.resamples or not kind.any_budget):
        raise BudgetError(
            f"{kind.name()} learns a fixed number of tokens, and on {spec.name} {found} is another "
            "number for each picture; ask for a number, e.g. --tokens 4"
        )
    return found
