"""The sprites of the micro world: what they are called, and one atlas with their pictures.

``artwork/objects.json`` is written by hand: one record per sprite with its name, category, emoji
code point (or, for a sign, the word on it) and whether it is held out from training. The pictures
are built from it once, by

    python -m etcbench.micro.artwork FLUENT_PACKAGE EMOJI_DATASOURCE_PACKAGE

with the two unpacked npm packages ``@lobehub/fluent-emoji-3d`` 1.1.0 and
``emoji-datasource-google`` 16.0.0; the result, ``artwork/atlas.webp``, is committed.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from etcbench.errors import UsageError

FOLDER = Path(__file__).parent / "artwork"
CELL = 64
COLUMNS = 16
# Several words share a colour, so that a word must be read and is not known by its plate.
PLATES = ((200, 30, 40), (20, 90, 170), (20, 110, 60), (40, 40, 40))
IRREGULAR = {"mouse": "mice", "sheep": "sheep", "cactus": "cacti", "dice": "dice", "leaf": "leaves"}
IRREGULAR |= {"loaf": "loaves", "hibiscus": "hibiscuses", "fox": "foxes"}


@dataclass(frozen=True)
class Sprite:
    """One drawable object.

    Attributes
    ----------
    index : int
        Place in the atlas; also the class id, 0-based.
    name : str
        What a person calls it; ``"sign"`` for every sign.
    category : str
        Its kind, e.g. ``"animal"``.
    held_out : bool
        True when it must never occur in training.
    code_point : str or None
        File stem in the emoji package; None for a sign.
    word : str or None
        The text on a sign.
    """

    index: int
    name: str
    category: str
    held_out: bool
    code_point: str | None = None
    word: str | None = None

    @property
    def with_article(self) -> str:
        """The name with its indefinite article, e.g. ``"an apple"``."""
        return f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.name}"

    @property
    def plural(self) -> str:
        """The plural of the name."""
        if self.name in IRREGULAR:
            return IRREGULAR[self.name]
        if self.name.endswith(("s", "sh", "ch", "x")):
            return self.name + "es"
        if self.name.endswith("y") and self.name[-2] not in "aeiou":
            return self.name[:-1] + "ies"
        return self.name + "s"


@cache
def sprites() -> tuple[Sprite, ...]:
    """Every sprite, in atlas order."""
    records = json.loads((FOLDER / "objects.json").read_text())
    return tuple(Sprite(index=i, **record) for i, record in enumerate(records))


@cache
def _atlas() -> np.ndarray:
    with Image.open(FOLDER / "atlas.webp") as image:
        return np.asarray(image.convert("RGBA"))


@cache
def scaled(index: int, side: int, mirrored: bool) -> np.ndarray:
    """One sprite, tightly cropped, scaled so that its longer side is ``side``.

    Parameters
    ----------
    index : int
        Sprite index.
    side : int
        Longer side in pixels.
    mirrored : bool
        Flip left and right.

    Returns
    -------
    numpy.ndarray
        float32 [h, w, 4] in 0..1, colours multiplied by alpha.
    """
    row, column = divmod(index, COLUMNS)
    cell = _atlas()[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
    solid = cell[..., 3] > 16
    rows, columns = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
    cell = cell[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = side / max(cell.shape[:2])
    size = (max(1, round(cell.shape[1] * scale)), max(1, round(cell.shape[0] * scale)))
    # Colour must be weighted by alpha before scaling, or transparent black bleeds into the edge.
    premultiplied = Image.fromarray(cell, "RGBA").convert("RGBa").resize(size, Image.Resampling.BOX)
    pixels = np.asarray(premultiplied).reshape(size[1], size[0], 4).astype(np.float32) / 255
    return np.ascontiguousarray(pixels[:, ::-1] if mirrored else pixels)


def _draw_sign(word: str, order: int) -> Image.Image:
    import matplotlib

    font_file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"
    image = Image.new("RGBA", (CELL, CELL))
    canvas = ImageDraw.Draw(image)
    plate = (0, 14, CELL - 1, 49)
    canvas.rounded_rectangle(plate, 4, fill=PLATES[order % len(PLATES)], outline="white", width=2)
    size = 40
    while canvas.textlength(word, ImageFont.truetype(font_file, size)) > CELL - 8:
        size -= 1
    font = ImageFont.truetype(font_file, min(size, 26))
    canvas.text((CELL / 2, 32), word, fill="white", font=font, anchor="mm")
    return image


def _read_emoji(folder: Path, sprite: Sprite, known: set[str]) -> Image.Image:
    file = folder / "assets" / f"{sprite.code_point}.webp"
    if not file.is_file():
        raise UsageError(f"{sprite.name}: no {file}; give the folder of the unpacked package")
    if str(sprite.code_point).replace("-fe0f", "") not in known:
        raise UsageError(f"{sprite.name}: code point {sprite.code_point} is not in emoji.json")
    with Image.open(file) as source:
        image = source.convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox())
    image.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
    cell = Image.new("RGBA", (CELL, CELL))
    cell.paste(image, ((CELL - image.width) // 2, (CELL - image.height) // 2))
    return cell


def build(fluent: Path, datasource: Path, output: Path = FOLDER / "atlas.webp") -> None:
    """Draw the atlas from the two unpacked npm packages.

    Parameters
    ----------
    fluent : pathlib.Path
        Folder of ``@lobehub/fluent-emoji-3d`` (holds ``assets/``).
    datasource : pathlib.Path
        Folder of ``emoji-datasource-google`` (holds ``emoji.json``).
    output : pathlib.Path
        Where to write the lossless WebP.

    Raises
    ------
    UsageError
        If a file of the packages is missing.
    """
    table = datasource / "emoji.json"
    if not table.is_file():
        raise UsageError(f"no {table}; give the folder of the unpacked package")
    known = {
        entry["unified"].lower().replace("-fe0f", "") for entry in json.loads(table.read_text())
    }
    height = -(-len(sprites()) // COLUMNS) * CELL
    atlas = Image.new("RGBA", (COLUMNS * CELL, height))
    for sprite in sprites():
        row, column = divmod(sprite.index, COLUMNS)
        cell = (
            _draw_sign(sprite.word, sprite.index)
            if sprite.word
            else _read_emoji(fluent, sprite, known)
        )
        atlas.paste(cell, (column * CELL, row * CELL))
    atlas.save(output, lossless=True, quality=100, method=6)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the sprite atlas from two npm packages.")
    parser.add_argument("fluent", type=Path, help="unpacked @lobehub/fluent-emoji-3d")
    parser.add_argument("datasource", type=Path, help="unpacked emoji-datasource-google")
    arguments = parser.parse_args()
    try:
        build(arguments.fluent, arguments.datasource)
    except UsageError as error:
        parser.error(str(error))
