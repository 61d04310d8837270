"""Read boxes from text, convert their coordinates, and compare them (spec tasks 4.7.1).

A box is (x0, y0, x1, y1), the corners, in pixels unless said otherwise.
"""

from __future__ import annotations

import re
from typing import Literal, get_args

Box = tuple[float, float, float, float]
Convention = Literal["unit", "unit_padded", "milli", "pixel"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)

# possessive quantifiers keep a megabyte of digits or brackets linear
_NUMBER = r"[-+]?+(?:\d++(?:\.\d*+)?+|\.\d++)(?:[eE][-+]?+\d++)?+"
_GAP = r"(?:\s*+,\s*+|\s++)"
_FOUR = rf"\s*+({_NUMBER}){_GAP}({_NUMBER}){_GAP}({_NUMBER}){_GAP}({_NUMBER})\s*+"
_KEYED = re.compile(rf"[\"'](?:bbox_2d|bbox|box)[\"']\s*+:\s*+\[{_FOUR}\]")
_BRACKETED = re.compile(rf"[\[(]{_FOUR}[\])]")
_PAIR = rf"\(\s*+({_NUMBER})\s*+,\s*+({_NUMBER})\s*+\)"
_MARKED = re.compile(rf"<\|box_start\|>\s*+{_PAIR}\s*+,\s*+{_PAIR}\s*+<\|box_end\|>")
# the 1 of "x1" is part of a name
_LOOSE = re.compile(rf"(?<![\w.]){_NUMBER}")
_LMMS_NUMBER = r"(-?\d+(?:\.\d+)?)"
_LMMS = re.compile(r"\[\s*" + r",\s*".join([_LMMS_NUMBER] * 4) + r"\s*\]")


def read_boxes(response: str) -> list[Box]:
    """Every box that a response lists, in the first of the known notations that occurs.

    In this order: JSON with a key ``bbox_2d``, ``bbox`` or ``box``; four numbers in brackets;
    ``<|box_start|>(x,y),(x,y)<|box_end|>``; the first four numbers anywhere.

    Returns
    -------
    list of Box
        Corners as written, in the model's own coordinates; empty if there is no box.
    """
    for notation in (_KEYED, _BRACKETED, _MARKED):
        found = [_box(match.groups()) for match in notation.finditer(response)]
        if found:
            return found
    numbers = [match[0] for match, _ in zip(_LOOSE.finditer(response), range(4), strict=False)]
    return [_box(tuple(numbers))] if len(numbers) == 4 else []


def read_box_lmms(response: str) -> Box | None:
    """Read the first box by lmms-eval's pattern: plain decimals, commas without a space before."""
    match = _LMMS.search(response)
    return _box(match.groups()) if match else None


def guess_convention(box: Box) -> Convention:
    """Guess the coordinates from their size alone, as one public toolkit does."""
    largest = max(box)
    if largest <= 1.5:
        return "unit"
    return "milli" if largest <= 1000 else "pixel"


def to_pixels(box: Box, convention: Convention, width: int, height: int) -> Box:
    """Convert a model's coordinates to pixels of the original picture.

    Parameters
    ----------
    convention : str
        ``unit``: fractions of width and height. ``unit_padded`` (LLaVA-1.5): fractions of the
        picture padded to a centred square. ``milli`` (Qwen3-VL): thousandths of width and height.
        ``pixel``: pixels.
    width, height : int
        Size of the original picture in pixels.
    """
    sx, sy, dx, dy = _scale(convention, width, height)
    x0, y0, x1, y1 = box
    return (x0 * sx - dx, y0 * sy - dy, x1 * sx - dx, y1 * sy - dy)


def from_pixels(box: Box, convention: Convention, width: int, height: int) -> Box:
    """Invert `to_pixels`."""
    sx, sy, dx, dy = _scale(convention, width, height)
    x0, y0, x1, y1 = box
    return ((x0 + dx) / sx, (y0 + dy) / sy, (x1 + dx) / sx, (y1 + dy) / sy)


def tidy(box: Box, width: int, height: int) -> Box:
    """Swap inverted corners and clip to the picture."""
    x0, y0, x1, y1 = box
    left, right = sorted(min(max(x, 0.0), float(width)) for x in (x0, x1))
    top, bottom = sorted(min(max(y, 0.0), float(height)) for y in (y0, y1))
    return (left, top, right, bottom)


def iou(first: Box, second: Box) -> float:
    """Intersection over union in continuous coordinates.

    0 when the union is empty or a side is inverted.
    """
    for x0, y0, x1, y1 in (first, second):
        if x1 < x0 or y1 < y0:
            return 0.0
    across = min(first[2], second[2]) - max(first[0], second[0])
    down = min(first[3], second[3]) - max(first[1], second[1])
    common = max(across, 0.0) * max(down, 0.0)
    union = _area(first) + _area(second) - common
    return common / union if union > 0 else 0.0


def centre_inside(box: Box, gold: Box) -> bool:
    """Whether the centre of `box` lies in `gold`, borders included."""
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return gold[0] <= x <= gold[2] and gold[1] <= y <= gold[3]


def _scale(convention: Convention, width: int, height: int) -> tuple[float, float, float, float]:
    if convention == "unit":
        return (width, height, 0, 0)
    if convention == "milli":
        return (width / 1000, height / 1000, 0, 0)
    if convention == "pixel":
        return (1, 1, 0, 0)
    side = max(width, height)
    return (side, side, (side - width) // 2, (side - height) // 2)


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _box(numbers: tuple[str, ...]) -> Box:
    x0, y0, x1, y1 = map(float, numbers)
    return (x0, y0, x1, y1)
