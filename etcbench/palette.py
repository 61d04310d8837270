"""One look for each method in every figure: colour, marker and line.

The colours are Okabe and Ito's, which the colour-blind can tell apart; marker and line tell methods
apart in grey too.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#8C8C00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h")
LINES = ("-", "--", "-.", ":")

# Explicit, so that a figure does not change its colours when a method is added.
_ORDER = (
    "etc",
    "voco",
    "quecc",
    "llama-vid",
    "mqt-llava",
    "fastv",
    "visionzip",
    "sparsevlm",
    "pdrop",
    "lightkv",
    "twigvlm",
    "twigvlm-pp",
    "explainc",
    "pool",
    "downsample",
    "random",
)
_REFERENCES = {"full": ("#000000", "-"), "blind": ("#767676", ":")}


@dataclass(frozen=True)
class Look:
    """How a method is drawn.

    Attributes
    ----------
    colour, marker, line : str
        In matplotlib's words.
    """

    colour: str
    marker: str
    line: str

    @property
    def plot(self) -> dict[str, Any]:
        """Arguments of a line plot."""
        return {"color": self.colour, "marker": self.marker, "linestyle": self.line}


def look_of(method: str) -> Look:
    """Give the look of a method; options in brackets behind its name do not change the colour.

    Parameters
    ----------
    method : str
        E.g. ``"fastv"`` or ``"etc[alpha=0.2]"``.
    """
    name, _, options = method.partition("[")
    if name in _REFERENCES:
        colour, line = _REFERENCES[name]
        return Look(colour, "", line)
    place = _ORDER.index(name) if name in _ORDER else _number(name)
    variant = _number(options) if options else 0
    return Look(
        COLOURS[place % len(COLOURS)],
        MARKERS[(place + variant) % len(MARKERS)],
        LINES[(place // len(COLOURS) + variant) % len(LINES)],
    )


def _number(text: str) -> int:
    """Turn a name into a number that is the same on every machine."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)
