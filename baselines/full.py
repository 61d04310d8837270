"""The uncompressed model: every visual token goes through every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from etcbench.compressor import Compressor


@dataclass(eq=False)
class Full(Compressor):
    """No compression; the reference row of every table."""

    takes_budget: ClassVar[bool] = False


METHOD = Full
