"""Draw what `inspection.inspect` found: one row per method, one panel per stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from PIL import Image

from etcbench.console import notice
from etcbench.errors import UsageError
from etcbench.glyphs import BOX, covering
from etcbench.inspection import Inspection, Stage

PANEL = 2.5  # inches
SIDE = 448  # pixels of a panel's longer side
MERGE = np.array([0.90, 0.62, 0.0])  # orange; told from kept and dropped by brightness too
ARROWS = 160  # more of them would hide the picture
SHOWN = 8  # letters that a notice names


def draw(found: Sequence[Inspection], picture: Image.Image, question: str, file: Path) -> None:
    """Write the picture of an inspection.

    Kept places show the picture as it is, merged ones are orange with a line to the token that
    holds them, dropped ones are dark and grey. Where a method has learned tokens, the last panel
    shows the attention that they pay to the picture. Text that matplotlib's own font does not have
    takes an installed one; letters that none has become boxes, and one notice says so.

    Parameters
    ----------
    found : sequence of Inspection
        One per method.
    picture : PIL.Image.Image
        The picture as the tower sees it.
    question : str
        For the heading.
    file : Path
        ``.png``, ``.svg`` or ``.pdf``.

    Raises
    ------
    UsageError
        If the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    families, missing = covering("".join([question, *(each.answer for each in found)]))
    if missing:
        notice(
            f"{file}: no installed font has {''.join(missing[:SHOWN])}"
            f"{' ...' * (len(missing) > SHOWN)} ({len(missing)} letters, drawn as boxes); "
            "one like Noto Sans CJK would"
        )
    boxes = dict.fromkeys(map(ord, missing), BOX)
    with matplotlib.rc_context({"font.family": families}):
        figure = _figure(found, picture, _printable(question), boxes)
    try:
        figure.savefig(file, dpi=140)
    except (OSError, ValueError) as error:
        raise UsageError(f"--out {file} cannot be written: {error}") from error
    finally:
        plt.close(figure)


def _figure(
    found: Sequence[Inspection], picture: Image.Image, question: str, boxes: dict[int, str]
) -> Any:
    from matplotlib import pyplot as plt

    columns = 1 + max(max(len(each.stages) for each in found), 1)
    size = (PANEL * columns, (PANEL + 0.95) * len(found) + 1.0)
    figure, grid = plt.subplots(len(found), columns, figsize=size, squeeze=False)
    pixels = _enlarged(picture)
    for row, each in zip(grid, found, strict=True):
        for axes in row:
            axes.set_axis_off()
        row[0].imshow(pixels)
        row[0].set_title("the picture,\nas the tower sees it", fontsize=8)
        for axes, stage in zip(row[1:], each.stages, strict=False):
            _panel(axes, pixels, stage)
        if not each.stages:
            message = "its tokens have\nno places" if each.looks else "sees no picture"
            row[1].text(0.5, 0.5, message, ha="center", va="center", fontsize=8)
        heading = " ".join([each.title, *(f"[{note}]" for note in each.notes)])
        answer = fill(f"answer: {_printable(each.answer).translate(boxes)}", 22 * columns)
        row[0].text(
            0,
            -0.06,
            f"{heading}\n{answer}",
            transform=row[0].transAxes,
            fontsize=9,
            va="top",
            parse_math=False,
        )
    heading = fill(question.translate(boxes), 26 * columns)
    figure.suptitle(heading, fontsize=10, parse_math=False)
    figure.subplots_adjust(
        left=0.02,
        right=0.98,
        top=1 - 0.95 / size[1],
        bottom=0.55 / size[1],
        hspace=0.4,
        wspace=0.06,
    )
    return figure


def _printable(text: str) -> str:
    """Replace what no font can show; a model may answer anything."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _enlarged(picture: Image.Image) -> np.ndarray:
    """Scale to the panel's size; values 0 to 1, shape (height, width, 3)."""
    scale = SIDE / max(picture.size)
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    return np.asarray(picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)) / 255


def _panel(axes: Any, pixels: np.ndarray, stage: Stage) -> None:
    height, width = pixels.shape[:2]
    rows, columns = stage.grid
    ys, xs = (np.linspace(0, end, n + 1) for end, n in ((height, rows), (width, columns)))
    grey = pixels.mean(-1, keepdims=True).repeat(3, -1)
    shown = 0.28 * grey
    axes.set_title(_title(stage), fontsize=8)
    if stage.heat is not None:
        heat = np.array(stage.heat).reshape(rows, columns)
        big = np.kron(heat, np.ones((8, 8)))
        axes.imshow(grey, extent=(0, width, height, 0))
        axes.imshow(big, cmap="viridis", alpha=0.6, extent=(0, width, height, 0))
        return
    for place in range(stage.places):
        y, x = divmod(place, columns)
        cell = np.s_[int(ys[y]) : int(ys[y + 1]), int(xs[x]) : int(xs[x + 1])]
        if place in stage.merged:
            shown[cell] = 0.55 * MERGE + 0.45 * grey[cell]
        elif place in stage.kept:
            shown[cell] = pixels[cell]
    axes.imshow(shown)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    if len(stage.merged) <= ARROWS:
        for place, home in stage.merged.items():
            if home >= 0:
                (y0, x0), (y1, x1) = divmod(place, columns), divmod(home, columns)
                line = [(xs[x] + xs[x + 1]) / 2 for x in (x0, x1)]
                axes.plot(line, [(ys[y] + ys[y + 1]) / 2 for y in (y0, y1)], "w-", lw=0.5)


def _title(stage: Stage) -> str:
    """Say what is left in two lines."""
    if stage.heat is not None:
        plural = "s" * (stage.learned > 1)
        return (
            f"{stage.label}: {stage.learned} learned token{plural}\ntheir attention to the picture"
        )
    lines = f"{stage.label}: {stage.tokens} token{'s' * (stage.tokens != 1)}"
    lines += f"\n{len(stage.kept)} of {stage.places} places kept"
    return lines + (f", {len(stage.merged)} merged" if stage.merged else "")
