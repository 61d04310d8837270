"""Short questions about a scene, with answers that are true by construction.

Every function takes a scene and a generator and returns a `Fact`, or None where the scene does not
allow the question (e.g. "where is the cat" with two cats). The wordings are those of the benchmark
a kind imitates; the rows of the micro benchmarks are made by the same functions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from etcbench.micro.artwork import Sprite, sprites
from etcbench.micro.scenes import BACKGROUNDS, DISTORTIONS, Placed, Scene

T = TypeVar("T")
SHORT = "\nAnswer the question using a single word or phrase."
BOX = "Please provide the bounding box coordinate of the region this sentence describes: "
LOCATE = (
    'Locate every object that matches the description "',
    '" in the image. Report bbox coordinates in JSON format.',
)
REGION = "Provide a short description for this region."
QUALITY = {"blur": "blurry", "noise": "noisy", "dark": "too dark", "bright": "too bright"}
MIN_OFFSET = 12  # pixels between two centres before one counts as left of or above the other


@dataclass(frozen=True)
class Fact:
    """A question without any prompt suffix, and its answer."""

    kind: str
    question: str
    answer: str


Ask = Callable[[Scene, np.random.Generator, bool | None], Fact | None]


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    """Draw one item, uniformly."""
    return items[int(rng.integers(len(items)))]


def trainable() -> list[Sprite]:
    """List every sprite that may occur in training."""
    return [sprite for sprite in sprites() if not sprite.held_out]


def name_counts(scene: Scene) -> Counter[str]:
    """Count how often each name occurs."""
    return Counter(placed.sprite.name for placed in scene.objects)


def unique(scene: Scene) -> list[Placed]:
    """List the objects whose name occurs once."""
    counts = name_counts(scene)
    return [placed for placed in scene.reading_order if counts[placed.sprite.name] == 1]


def alone(scene: Scene) -> list[Placed]:
    """List the objects that have their cell for themselves."""
    cells = Counter(placed.cell for placed in scene.objects)
    return [placed for placed in scene.reading_order if cells[placed.cell] == 1]


def absent(scene: Scene, rng: np.random.Generator) -> Sprite:
    """Draw a sprite whose name does not occur; half of the time from a category that does."""
    names = set(name_counts(scene))
    missing = [sprite for sprite in trainable() if sprite.name not in names]
    kinds = {placed.sprite.category for placed in scene.objects}
    near = [sprite for sprite in missing if sprite.category in kinds]
    return pick(rng, near if near and rng.random() < 0.5 else missing)


def _coin(rng: np.random.Generator, yes: bool | None) -> bool:
    return bool(rng.integers(2)) if yes is None else yes


def _yes_no(kind: str, question: str, yes: bool) -> Fact:
    return Fact(kind, question, "Yes" if yes else "No")


def exist(
    scene: Scene,
    rng: np.random.Generator,
    yes: bool | None = None,
    wordings: Sequence[str] = (
        "Is there {} in this image?",
        "Is there {} in the image?",
        "Is there {} in the picture?",
    ),
) -> Fact:
    """Ask for the presence of an object, as MME existence, POPE and VQAv2 do."""
    yes = _coin(rng, yes)
    sprite = pick(rng, scene.classes) if yes else absent(scene, rng)
    return _yes_no("exist", pick(rng, wordings).format(sprite.with_article), yes)


def plural_of(name: str) -> str:
    """Look up the plural of a sprite's name."""
    return next(sprite.plural for sprite in sprites() if sprite.name == name)


def count_yes_no(scene: Scene, rng: np.random.Generator, yes: bool | None = None) -> Fact:
    """Ask for a number of objects, as MME count does."""
    yes = _coin(rng, yes)
    counts = name_counts(scene)
    level = pick(rng, sorted(set(counts.values())))
    name = pick(rng, sorted(n for n, c in counts.items() if c == level))
    asked = level if yes else pick(rng, [k for k in range(1, 5) if k != level])
    noun = f"1 {name}" if asked == 1 else f"{asked} {plural_of(name)}"
    verb = "Is" if asked == 1 else "Are"
    return _yes_no("count_yes_no", f"{verb} there {noun} in this image?", yes)


def count(scene: Scene, rng: np.random.Generator, _: bool | None = None) -> Fact:
    """Ask how many objects of a name there are; the answer is a digit, one in eight times 0."""
    counts = name_counts(scene)
    if rng.random() < 1 / 8:
        sprite = absent(scene, rng)
        return Fact("count", f"How many {sprite.plural} are in the picture?", "0")
    level = pick(rng, sorted(set(counts.values())))
    name = pick(rng, sorted(n for n, c in counts.items() if c == level))
    return Fact("count", f"How many {plural_of(name)} are in the picture?", str(level))


def total(scene: Scene, rng: np.random.Generator, _: bool | None = None) -> Fact:
    """Ask how many objects there are."""
    return Fact("total", "How many objects are in the picture?", str(len(scene.objects)))


def name_at(scene: Scene, rng: np.random.Generator, _: bool | None = None) -> Fact | None:
    """Ask what is in a cell that holds one object."""
    if not (candidates := alone(scene)):
        return None
    placed = pick(rng, candidates)
    where = scene.cell_name(placed.cell)
    return Fact("name", f"What is at the {where} of the picture?", placed.sprite.name)


def kind_at(scene: Scene, rng: np.random.Generator, _: bool | None = None) -> Fact | None:
    """Ask for the category of the one object in a cell."""
    if not (candidates := alone(scene)):
        return None
    placed = pick(rng, candidates)
    where = scene.cell_name(placed.cell)
    question = f"What kind of object is at the {where} of the picture?"
    return Fact("kind", question, placed.sprite.category)


def position(scene: Scene, rng: np.random.Generator, _: bool | None = None) -> Fact | None:
    """Ask where the only object of a name is."""
    if not (candidates := unique(scene)):
        return None
    placed = pick(rng, candidates)
    question = f"Where is the {placed.sprite.name} in the picture?"
    return Fact("pos", question, scene.cell_name(placed.cell))


def at_cell(scene: Scene, rng: np.random.Generator, yes: bool | None = None) -> Fact:
    """Ask whether an object is in a cell; half of the noes name one that is elsewhere."""
    yes = _coin(rng, yes)
    there = {(placed.sprite.name, placed.cell) for placed in scene.objects}
    placed = pick(rng, scene.reading_order)
    sprite, cell = placed.sprite, placed.cell
    if not yes:
        elsewhere = [
            c for c in range(scene.cells[0] * scene.cells[1]) if (sprite.name, c) not in there
        ]
        if elsewhere and rng.random() < 0.5:
            cell = pick(rng, elsewhere)
        else:
            sprite = absent(scene, rng)
    question = f"Is there {sprite.with_article} at the {scene.cell_name(cell)} of the picture?"
    return _yes_no("at_cell", question, yes)


def related(scene: Scene) -> list[tuple[Placed, Placed, str]]:
    """List the pairs of uniquely named objects with each relation that holds clearly."""
    found = []
    for a in unique(scene):
        for b in unique(scene):
            dx, dy = b.centre[0] - a.centre[0], b.centre[1] - a.centre[1]
            found += [(a, b, "to the left of")] if dx >= MIN_OFFSET else []
            found += [(a, b, "to the right of")] if dx <= -MIN_OFFSET else []
            found += [(a, b, "above")] if dy >= MIN_OFFSET else []
            found += [(a, b, "below")] if dy <= -MIN_OFFSET else []
    return found


OPPOSITE = {"to the left of": "to the right of", "above": "below"}
OPPOSITE |= {v: k for k, v in OPPOSITE.items()}


def relation(scene: Scene, rng: np.random.Generator, yes: bool | None = None) -> Fact | None:
    """Ask how two objects lie, as MME position does; the wrong relation is the opposite one."""
    if not (pairs := related(scene)):
        return None
    yes = _coin(rng, yes)
    a, b, how = pick(rng, pairs)
    asked = how if yes else OPPOSITE[how]
    return _yes_no("rel", f"Is the {a.sprite.name} {asked} the {b.sprite.name}?", yes)


def color(scene: Scene, rng: np.random.Generator, _: bool | None = None) -> Fact:
    """Ask for the colour of the ground."""
    return Fact("color", "What color is the background of the picture?", scene.background)


def color_yes_no(scene: Scene, rng: np.random.Generator, yes: bool | None = None) -> Fact:
    """Ask for a colour of the ground, as MME color does."""
    yes = _coin(rng, yes)
    others = [name for name in BACKGROUNDS if name != scene.background]
    name = scene.background if yes else pick(rng, others)
    return _yes_no("color_yes_no", f"Is there a {name} background in the image?", yes)


def words(scene: Scene) -> list[str]:
    """List the distinct words in the picture, in reading order."""
    return list(dict.fromkeys(o.sprite.word for o in scene.reading_order if o.sprite.word))


def word(scene: Scene, rng: np.random.Generator, _: bool | None = None) -> Fact | None:
    """Ask what is written, with the place when there are several signs."""
    signs = [placed for placed in scene.reading_order if placed.sprite.word]
    if not signs:
        return None
    if len(words(scene)) == 1:
        return Fact("word", "What word is written in the picture?", words(scene)[0])
    placed = pick(rng, signs)
    question = f"What word is written at the {scene.cell_name(placed.cell)} of the picture?"
    return Fact("word", question, str(placed.sprite.word))


def all_words() -> list[str]:
    """List every word there is a sign for."""
    return [sprite.word for sprite in sprites() if sprite.word]


def word_yes_no(scene: Scene, rng: np.random.Generator, yes: bool | None = None) -> Fact | None:
    """Ask for a word, as MME OCR does."""
    if not (there := words(scene)):
        return None
    yes = _coin(rng, yes)
    asked = pick(rng, there if yes else [w for w in all_words() if w not in there])
    return _yes_no("word_yes_no", f'Is the word "{asked}" written in the picture?', yes)


def quality(scene: Scene, rng: np.random.Generator, yes: bool | None = None) -> Fact | None:
    """Ask for a distortion; an undistorted picture can only be asked about with the answer no."""
    if yes and scene.distortion == "none":
        return None
    if yes is None:
        yes = scene.distortion != "none" and rng.random() < 0.85
    wrong = [name for name in DISTORTIONS[1:] if name != scene.distortion]
    name = scene.distortion if yes else pick(rng, wrong)
    return _yes_no("quality", f"Is this picture {QUALITY[name]}?", yes)


def label(sprite: Sprite) -> str:
    """Name an object as a caption does, e.g. ``"cat"`` or ``"STOP sign"``."""
    return f"{sprite.word} sign" if sprite.word else sprite.name


def caption(scene: Scene, rng: np.random.Generator, _: bool | None = None) -> Fact:
    """Ask for all objects in reading order, briefly or with their places."""
    if rng.random() < 0.5:
        names = ", ".join(label(placed.sprite) for placed in scene.reading_order)
        return Fact("cap", "Describe the picture briefly.", names)
    places = []
    for cell in sorted({placed.cell for placed in scene.objects}):
        names = " and ".join(label(o.sprite) for o in scene.reading_order if o.cell == cell)
        places.append(f"{names} at the {scene.cell_name(cell)}")
    return Fact("cap", "Describe the picture in detail.", ", ".join(places))


def expressions(scene: Scene, placed: Placed) -> list[str]:
    """List phrases that pick out one object and no other; there may be none."""
    twins = [o for o in scene.objects if label(o.sprite) == label(placed.sprite)]
    name, where = label(placed.sprite), scene.cell_name(placed.cell)
    found = [name] if len(twins) == 1 else []
    if sum(twin.cell == placed.cell for twin in twins) == 1:
        found.append(f"{name} at the {where}")
    return found


def unit_box(scene: Scene, placed: Placed) -> str:
    """Write the visible box in fractions of the picture, two decimals, as LLaVA does."""
    height, width = scene.size
    x0, y0, x1, y1 = placed.box
    values = (x0 / width, y0 / height, x1 / width, y1 / height)
    return "[" + ", ".join(f"{value:.2f}" for value in values) + "]"


def milli_box(scene: Scene, placed: Placed) -> str:
    """Write the visible box in thousandths of the picture as JSON, as Qwen3-VL does."""
    height, width = scene.size
    x0, y0, x1, y1 = placed.box
    values = (x0 / width, y0 / height, x1 / width, y1 / height)
    return '[{"bbox_2d": [' + ", ".join(f"{1000 * value:.0f}" for value in values) + "]}]"


def _described(scene: Scene, rng: np.random.Generator) -> tuple[Placed, str] | None:
    """Draw an object that a phrase picks out, and the phrase."""
    candidates = [placed for placed in scene.reading_order if expressions(scene, placed)]
    if not candidates:
        return None
    placed = pick(rng, candidates)
    return placed, pick(rng, expressions(scene, placed))


def box(scene: Scene, rng: np.random.Generator, _: bool | None = None) -> Fact | None:
    """Ask for the box of an object."""
    if not (found := _described(scene, rng)):
        return None
    placed, phrase = found
    return Fact("box", BOX + phrase, unit_box(scene, placed))


def box_milli(scene: Scene, rng: np.random.Generator, _: bool | None = None) -> Fact | None:
    """Ask for the box of an object in Qwen3-VL's words (spec tasks 4.7.1)."""
    if not (found := _described(scene, rng)):
        return None
    placed, phrase = found
    return Fact("box_milli", phrase.join(LOCATE), milli_box(scene, placed))


def region(scene: Scene, rng: np.random.Generator) -> tuple[Placed, Fact]:
    """Draw an object to be circled in the picture, and the request to describe it."""
    placed = pick(rng, scene.reading_order)
    answer = f"{label(placed.sprite)} at the {scene.cell_name(placed.cell)}"
    return placed, Fact("region", REGION, answer)


ASK: dict[str, Ask] = {
    "exist": exist,
    "count_yes_no": count_yes_no,
    "count": count,
    "total": total,
    "name": name_at,
    "kind": kind_at,
    "cap": caption,
    "pos": position,
    "at_cell": at_cell,
    "rel": relation,
    "color": color,
    "color_yes_no": color_yes_no,
    "word": word,
    "word_yes_no": word_yes_no,
    "quality": quality,
    "box": box,
    "box_milli": box_milli,
}
