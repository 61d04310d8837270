"""Scenes of the micro world: a description that is true by construction, and its picture.

A scene is a grid of 32-pixel cells (2 x 2 unless told otherwise) holding 1 to 6 sprites on a
textured ground. `draw_scene` samples the description, `Scene.render` paints it; both depend on
nothing but the seed.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeVar

import numpy as np
from PIL import Image

from etcbench.errors import UsageError, unknown_name
from etcbench.micro.artwork import Sprite, scaled, sprites

T = TypeVar("T")
Policy = Literal["train", "iid", "combo", "objects"]
POLICIES: tuple[Policy, ...] = ("train", "iid", "combo", "objects")
CELL = 32
LARGE = (20, 22, 24, 26, 28, 30)
SMALL = (15, 16, 17)
SIGN = (28, 30)
OVERHANG = 2
HELD_OUT_SHARE = 0.1
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "red": (205, 60, 55),
    "green": (70, 160, 75),
    "blue": (65, 110, 205),
    "yellow": (235, 210, 80),
    "purple": (145, 85, 180),
    "gray": (135, 135, 135),
    "brown": (125, 85, 50),
    "white": (240, 240, 238),
}
DISTORTIONS = ("none", "blur", "noise", "dark", "bright")
DISTORTED_SHARE = 0.2


@dataclass(frozen=True)
class Placed:
    """One object in a scene: which sprite, where and how it is drawn.

    ``box`` is (x0, y0, x1, y1) in pixels, clipped to the picture, x1 and y1 exclusive; ``corner``
    is the unclipped top-left corner; ``cell`` is the raster index of its cell.
    """

    sprite: Sprite
    box: tuple[int, int, int, int]
    corner: tuple[int, int]
    cell: int
    side: int
    mirrored: bool
    brightness: float

    @property
    def centre(self) -> tuple[float, float]:
        """Centre (x, y) of the box in pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Scene:
    """What a picture shows.

    ``cells`` is (rows, columns); ``objects`` are in drawing order, later ones on top; ``seed``
    fixes the ground's texture and the noise.
    """

    cells: tuple[int, int]
    objects: tuple[Placed, ...]
    background: str
    distortion: str
    seed: int

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.cells[0] * CELL, self.cells[1] * CELL

    @property
    def classes(self) -> list[Sprite]:
        """The distinct sprites, in reading order of their first cell."""
        return list(dict.fromkeys(o.sprite for o in self.reading_order))

    @property
    def reading_order(self) -> list[Placed]:
        """The objects by cell, and from left to right and top to bottom inside one."""
        return sorted(self.objects, key=lambda o: (o.cell, o.corner))

    def cell_name(self, cell: int) -> str:
        """Say where a cell is, e.g. ``"top left"``."""
        rows, columns = self.cells
        down, across = divmod(cell, columns)
        parts = [_step(down, rows, ("top", "middle", "bottom"))] if rows > 1 else []
        if columns > 1:
            parts.append(_step(across, columns, ("left", "center", "right")))
        return " ".join(parts) or "center"

    def render(self) -> np.ndarray:
        """Paint the scene: uint8 [H, W, 3]."""
        rng = np.random.default_rng(self.seed)
        canvas = _ground(self.background, self.size, rng)
        for placed in self.objects:
            pixels, (y0, y1, x0, x1) = _cut(placed, self.size)
            area = canvas[y0:y1, x0:x1]
            area *= 1 - pixels[..., 3:]
            area += np.minimum(pixels[..., :3] * placed.brightness, 1)
        canvas = _distort(canvas, self.distortion, rng)
        return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)

    def patch_classes(self, patch: int = 8) -> np.ndarray:
        """Class of every patch: 0 for ground, else sprite index + 1.

        A patch belongs to the object that shows most in it, if that fills at least 30 % of it.

        Returns
        -------
        numpy.ndarray
            int64 [H // patch, W // patch].
        """
        height, width = self.size
        owner = np.full((height, width), -1)
        for number, placed in enumerate(self.objects):
            pixels, (y0, y1, x0, x1) = _cut(placed, self.size)
            owner[y0:y1, x0:x1][pixels[..., 3] > 0.5] = number
        blocks = owner.reshape(height // patch, patch, width // patch, patch)
        shares = np.stack([(blocks == n).mean((1, 3)) for n in range(len(self.objects))])
        best = shares.argmax(0)
        ids = np.array([o.sprite.index + 1 for o in self.objects])
        return np.where(shares.max(0) >= 0.3, ids[best], 0).astype(np.int64)


def patch_names(scene: Scene, patch: int) -> list[str]:
    """Name what every patch shows, in raster order: an object, a word, or the ground's colour."""
    names = [scene.background, *(sprite.word or sprite.name for sprite in sprites())]
    return [names[number] for number in scene.patch_classes(patch).reshape(-1)]


def _step(index: int, count: int, names: tuple[str, str, str]) -> str:
    if count > 3:
        raise UsageError(f"{count} cells on one side have no plain names; use at most 3")
    return names[0] if index == 0 else names[2] if index == count - 1 else names[1]


def _cut(placed: Placed, size: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    pixels = scaled(placed.sprite.index, placed.side, placed.mirrored)
    x, y = placed.corner
    y0, y1 = max(y, 0), min(y + pixels.shape[0], size[0])
    x0, x1 = max(x, 0), min(x + pixels.shape[1], size[1])
    return pixels[y0 - y : y1 - y, x0 - x : x1 - x], (y0, y1, x0, x1)


def _ground(name: str, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    height, width = size
    colour = np.array(BACKGROUNDS[name], np.float32) / 255 + rng.uniform(-0.04, 0.04, 3)
    block = int(rng.choice((2, 4, 8)))
    coarse = rng.uniform(-0.07, 0.07, (height // block, width // block, 1))
    texture = coarse.repeat(block, 0).repeat(block, 1)
    slope = rng.uniform(-0.09, 0.09, 2)
    rise = slope[0] * np.linspace(-1, 1, height)[:, None]
    gradient = rise + slope[1] * np.linspace(-1, 1, width)[None, :]
    grain = rng.normal(0, 0.015, (height, width, 3))
    return (colour + texture + gradient[..., None] + grain).clip(0, 1).astype(np.float32)


def _distort(canvas: np.ndarray, name: str, rng: np.random.Generator) -> np.ndarray:
    if name == "blur":
        weights = np.exp(-0.5 * (np.arange(-3, 4) / 1.3) ** 2)
        weights /= weights.sum()
        for axis in (0, 1):
            pads = [(3, 3) if a == axis else (0, 0) for a in range(3)]
            padded = np.pad(canvas, pads, mode="edge")
            length = canvas.shape[axis]
            canvas = np.sum(
                [w * np.take(padded, range(k, k + length), axis) for k, w in enumerate(weights)], 0
            )
        return canvas
    if name == "noise":
        return canvas + rng.normal(0, 0.11, canvas.shape)
    if name == "dark":
        return canvas * 0.42
    if name == "bright":
        return canvas * 0.75 + 0.42
    return canvas


@cache
def _held_out_pairs() -> frozenset[tuple[int, int]]:
    keys = [sprite.word or sprite.name for sprite in sprites()]
    limit = HELD_OUT_SHARE * 2**32
    return frozenset(
        (i, j)
        for i in range(len(keys))
        for j in range(i + 1, len(keys))
        # A hash that does not depend on the process or the machine, unlike `hash`.
        if zlib.crc32("|".join(sorted((keys[i], keys[j]))).encode()) < limit
    )


def is_held_out_pair(a: Sprite, b: Sprite) -> bool:
    """Whether two different classes never occur together in training."""
    return (min(a.index, b.index), max(a.index, b.index)) in _held_out_pairs()


@cache
def _pool(held_out: bool) -> tuple[Sprite, ...]:
    return tuple(sprite for sprite in sprites() if sprite.held_out == held_out)


def _pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    return items[int(rng.integers(len(items)))]


def _classes(rng: np.random.Generator, count: int, policy: Policy) -> list[Sprite]:
    pool = _pool(False)
    chosen: list[Sprite] = []
    if policy == "combo":
        a, b = _pick(rng, _trainable_pairs())
        chosen = [sprites()[a], sprites()[b]]
    elif policy == "objects":
        chosen = [_pick(rng, _pool(True))]
    while len(chosen) < count:
        new = _pick(rng, pool)
        clash = policy != "combo" and any(is_held_out_pair(new, old) for old in chosen)
        if new not in chosen and not clash:
            chosen.append(new)
    return [chosen[i] for i in rng.permutation(len(chosen))]


@cache
def _trainable_pairs() -> tuple[tuple[int, int], ...]:
    held = {sprite.index for sprite in _pool(True)}
    return tuple(sorted(p for p in _held_out_pairs() if not held & set(p)))


def _place(
    rng: np.random.Generator, sprite: Sprite, cell: int, slot: int | None, cells: tuple[int, int]
) -> Placed:
    side = int(_pick(rng, SIGN if sprite.word else LARGE if slot is None else SMALL))
    mirrored = bool(rng.integers(2)) and sprite.word is None
    height, width = scaled(sprite.index, side, mirrored).shape[:2]
    left, top = cell % cells[1] * CELL, cell // cells[1] * CELL
    room = [(left, top, CELL, CELL)]
    if slot is not None:  # the two diagonals of the cell, so that the two sprites barely overlap
        half = CELL // 2
        down = (slot % 2) ^ (slot // 2)
        room = [(left + slot % 2 * half, top + down * half, half, half)]
    x0, y0, w, h = room[0]
    x = int(rng.integers(x0 - OVERHANG, max(x0 + w - width + OVERHANG, x0 - OVERHANG) + 1))
    y = int(rng.integers(y0 - OVERHANG, max(y0 + h - height + OVERHANG, y0 - OVERHANG) + 1))
    box = (
        max(x, 0),
        max(y, 0),
        min(x + width, cells[1] * CELL),
        min(y + height, cells[0] * CELL),
    )
    return Placed(sprite, box, (x, y), cell, side, mirrored, float(rng.uniform(0.85, 1.1)))


def draw_scene(
    rng: np.random.Generator,
    policy: Policy = "train",
    cells: tuple[int, int] = (2, 2),
    classes: int | None = None,
    distortion: str | None = None,
    background: str | None = None,
) -> Scene:
    """Sample a scene.

    The number of distinct classes is drawn first, uniformly from 1 to 4, then the number of
    objects, then who repeats; drawing objects one by one would leave most scenes with one class
    (spec micro-feasibility 1).

    Parameters
    ----------
    rng : numpy.random.Generator
        The only source of chance.
    policy : {"train", "iid", "combo", "objects"}
        ``train`` and ``iid``: no held-out object, no held-out pair. ``combo``: at least one
        held-out pair. ``objects``: one held-out object.
    cells : tuple of int
        (rows, columns).
    classes : int, optional
        Number of distinct classes.
    distortion, background : str, optional
        Fix what is otherwise drawn.

    Raises
    ------
    UsageError
        For an unknown distortion, background or policy.
    """
    if policy not in POLICIES:
        raise unknown_name("policy", policy, POLICIES)
    if distortion is not None and distortion not in DISTORTIONS:
        raise unknown_name("distortion", distortion, DISTORTIONS)
    if background is not None and background not in BACKGROUNDS:
        raise unknown_name("background", background, BACKGROUNDS)
    slots = cells[0] * cells[1]
    lowest = 2 if policy == "combo" else 1
    count = classes or int(rng.integers(lowest, min(4, slots) + 1))
    chosen = _classes(rng, count, policy)
    total = int(rng.integers(count, min(slots + 2, count + 3) + 1))
    members = list(chosen)
    favourite = _pick(rng, chosen)
    for _ in range(total - count):
        members.append(favourite if rng.random() < 0.6 else _pick(rng, chosen))
    members = [members[i] for i in rng.permutation(total)]
    # A sign needs a whole cell to be legible; everything else can share one. Where that leaves too
    # little room, a repeated sprite goes.
    while True:
        signs = [m for m in members if m.word]
        others = [m for m in members if not m.word]
        pairs = min(max(len(members) - slots, int(rng.random() < 0.2)), len(others) // 2)
        if len(members) - pairs <= slots:
            break
        members.remove(next(m for m in members if members.count(m) > 1))
    order = [int(c) for c in rng.permutation(slots)]
    objects: list[Placed] = []
    for _ in range(pairs):
        cell, diagonal = order.pop(), int(rng.integers(2)) * 2
        for slot in range(2):
            objects.append(_place(rng, others.pop(), cell, diagonal + slot, cells))
    objects.extend(_place(rng, sprite, order.pop(), None, cells) for sprite in signs + others)
    objects = [objects[i] for i in rng.permutation(len(objects))]
    if distortion is None:
        distorted = rng.random() < DISTORTED_SHARE
        distortion = _pick(rng, DISTORTIONS[1:]) if distorted else "none"
    return Scene(
        cells,
        tuple(objects),
        background or _pick(rng, list(BACKGROUNDS)),
        distortion,
        int(rng.integers(2**31)),
    )


def scene_at(
    seed: int,
    index: int,
    policy: Policy = "train",
    cells: tuple[int, int] = (2, 2),
    distortion: str | None = None,
) -> tuple[Scene, np.random.Generator]:
    """Draw scene number ``index`` of a stream; return it with the generator for its questions.

    Streams of different policies share no scene, whatever the seed.
    """
    rng = np.random.default_rng([seed, POLICIES.index(policy), index])
    return draw_scene(rng, policy, cells, distortion=distortion), rng


def encode_jpeg(picture: np.ndarray) -> bytes:
    """Encode uint8 [H, W, 3] as JPEG: quality 95, colour at full resolution (4:4:4)."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def through_jpeg(picture: np.ndarray) -> np.ndarray:
    """Encode and decode, as the pictures of the benchmark rows are."""
    with Image.open(io.BytesIO(encode_jpeg(picture))) as image:
        return np.asarray(image.convert("RGB"))
