"""The model without the picture: what the question alone gives away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from etcbench.compressor import Compressor


@dataclass(eq=False)
class Blind(Compressor):
    """Zero visual tokens: the prompt has no image line at all (spec tasks 2)."""

    takes_budget: ClassVar[bool] = False
    uses_image: ClassVar[bool] = False

    def schedule(self, visual_tokens: int, layers: int) -> list[int]:
        """No layer holds a visual token."""
        return [0] * layers


METHOD = Blind
