"""The training stream: freshly drawn pictures, each with a dozen question-answer turns.

A stream is addressed by index and depends on nothing but its seed, so that training resumes exactly
and two methods can be given the same data in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from etcbench.errors import UsageError, unknown_name
from etcbench.micro import choices
from etcbench.micro.questions import ASK, SHORT, pick, quality, region, words
from etcbench.micro.scenes import Policy, Scene, draw_scene, patch_names, scene_at, through_jpeg

MIX: dict[str, float] = {
    "exist": 2.2,
    "count": 1.3,
    "count_yes_no": 0.6,
    "total": 0.5,
    "name": 1.6,
    "kind": 0.7,
    "cap": 1.0,
    "pos": 0.7,
    "at_cell": 0.6,
    "rel": 0.6,
    "color": 0.4,
    "color_yes_no": 0.3,
    "word": 2.0,
    "word_yes_no": 1.0,
    "quality": 0.3,
    "box": 0.5,
    "letter": 1.2,
    "quality_letter": 0.25,
}
TURNS = 11
BLIND_SHARE = 0.08
REGION_SHARE = 0.12
JPEG_SHARE = 0.5
OCR_SHARE = 0.25
SHAPE_RUN = 32  # so that a batch has one shape as a rule and is not padded
TRIES = 200  # scenes drawn for a mix that suits few of them
PATCH = 8  # pixels on a side that one visual token shows
DISTORTED_FACTOR = 6.0  # one scene in five is distorted; asking those more balances yes and no


@dataclass(frozen=True)
class Turn:
    """One question and answer.

    ``question`` is everything that stands between the image line and `` ASSISTANT:`` in LLaVA's
    prompt, suffix included; ``answer`` is the bare answer, to be encoded with one space in front.
    """

    kind: str
    question: str
    answer: str


def _letter(scene: Scene, rng: np.random.Generator) -> Turn:
    form = rng.random()
    count = 4 if rng.random() < 0.7 else int(rng.integers(2, 6))
    if form < 0.12:
        chinese = choices.in_chinese(scene, rng, 4)
        text = choices.lettered(chinese, last=choices.LETTER_ZH)
        return Turn("letter", text, chinese.letter)
    choice = choices.draw_choice(scene, rng, options=count)
    hint = ""
    if form < 0.24:
        hint = f"Context: {pick(rng, choices.HINTS)}\n"
    elif form < 0.3:
        hint = f"{pick(rng, choices.HINTS)}\n"
    return Turn("letter", choices.lettered(choice, hint), choice.letter)


def _quality_letter(scene: Scene, rng: np.random.Generator) -> Turn:
    if rng.random() < 0.35 and (fact := quality(scene, rng)):
        choice = choices.yes_no(rng, fact)
    else:
        choice = choices.draw_choice(scene, rng, choices.LOW_LEVEL)
    return Turn("quality_letter", choices.one_of(choice), choice.letter)


LETTERED: dict[str, Callable[[Scene, np.random.Generator], Turn]] = {
    "letter": _letter,
    "quality_letter": _quality_letter,
}


def _short(kind: str, scene: Scene, rng: np.random.Generator) -> Turn | None:
    if not (fact := ASK[kind](scene, rng, None)):
        return None
    if kind in ("cap", "box", "box_milli"):
        return Turn(kind, fact.question, fact.answer)
    ocr = ""
    if kind == "word" and rng.random() < OCR_SHARE:
        ocr = f"\nReference OCR token: {', '.join(words(scene))}"
    return Turn(kind, fact.question + ocr + SHORT, fact.answer)


def draw_turns(
    scene: Scene, rng: np.random.Generator, n: int = TURNS, mix: Mapping[str, float] = MIX
) -> list[Turn]:
    """Draw question turns on a scene, no question twice.

    Parameters
    ----------
    scene : Scene
        What the picture shows.
    rng : numpy.random.Generator
        Source of chance.
    n : int
        How many turns; fewer come back only when a narrow mix runs out of questions.
    mix : mapping of str to float
        Relative weight of every kind. Word and quality questions count more where there is a sign
        or a distortion.

    Returns
    -------
    list of Turn
        Empty where ``n`` is 0 or no kind of the mix suits the scene.

    Raises
    ------
    UsageError
        If the mix names an unknown kind or has no weight.
    """
    kinds = list(mix)
    for kind in kinds:
        if kind not in LETTERED and kind not in ASK:
            raise unknown_name("kind of turn", kind, [*ASK, *LETTERED])
    if min(mix.values(), default=0) < 0 or not sum(mix.values()):
        raise UsageError(f"the mix of turns {dict(mix)} needs weights of 0 or more, one above 0")
    weights = np.array([mix[kind] for kind in kinds])
    for i, kind in enumerate(kinds):
        if kind.startswith("quality") and scene.distortion != "none":
            weights[i] *= DISTORTED_FACTOR
        if kind.startswith("word") and not words(scene):
            weights[i] = 0
    if not n or not weights.sum():
        return []
    turns: dict[str, Turn] = {}
    for index in rng.choice(len(kinds), 6 * n, p=weights / weights.sum()):
        kind = kinds[index]
        turn = LETTERED[kind](scene, rng) if kind in LETTERED else _short(kind, scene, rng)
        if turn and turn.question not in turns:
            turns[turn.question] = turn
        if len(turns) == n:
            break
    return list(turns.values())


def circled(picture: np.ndarray, box: tuple[float, float, float, float]) -> np.ndarray:
    """Draw a red, 1-pixel rectangle at (x0, y0, x1, y1) on a copy, as RefCOCO captions need it."""
    image = Image.fromarray(picture)
    ImageDraw.Draw(image).rectangle(box, outline="red", width=1)
    return np.asarray(image)


@dataclass(frozen=True)
class TurnStream:
    """Endless training samples, addressed by index.

    Parameters
    ----------
    seed : int
        Fixes everything.
    cells : tuple of int
        (rows, columns) of 32-pixel cells.
    shapes : tuple of tuple of int
        Several ``cells`` instead, which take turns every `SHAPE_RUN` samples.
    policy : {"train", "iid", "combo", "objects"}
        Which scenes; anything but ``"train"`` is for measuring.
    turns : int
        Turns per picture; with 0 a sample is its picture and what the patches show.
    mix : mapping of str to float
        Weight of every kind of turn.
    blind_share : float
        Share of samples without a picture, so that the model's answers to an empty prompt are its
        prior.
    """

    seed: int = 0
    cells: tuple[int, int] = (2, 2)
    policy: Policy = "train"
    turns: int = TURNS
    mix: Mapping[str, float] | None = None
    blind_share: float = BLIND_SHARE
    shapes: tuple[tuple[int, int], ...] = ()

    def sample(self, index: int) -> dict[str, Any]:
        """Draw sample number ``index``.

        Returns
        -------
        dict
            ``picture``: uint8 [H, W, 3], or None for a blind sample; ``turns``: list of
            (question, answer); ``kinds``: the kind of every turn; ``scene``: the `Scene`;
            ``patch_names``: what every patch shows, in raster order.
        """
        shapes = self.shapes or (self.cells,)
        cells = shapes[index // SHAPE_RUN % len(shapes)]
        scene, rng = scene_at(self.seed, index, self.policy, cells)
        blind, circle, jpeg = rng.random(3) < (self.blind_share, REGION_SHARE, JPEG_SHARE)
        turns = draw_turns(scene, rng, self.turns, self.mix or MIX)
        tries = 1
        while self.turns and not turns:  # e.g. only words are asked for, and there is no sign
            if tries == TRIES:
                raise UsageError(f"no scene suits the mix of turns {dict(self.mix or MIX)}")
            scene = draw_scene(rng, self.policy, cells)
            turns = draw_turns(scene, rng, self.turns, self.mix or MIX)
            tries += 1
        picture = None
        if not blind:
            picture = scene.render()
            if jpeg:
                picture = through_jpeg(picture)
            if circle and self.turns:
                placed, fact = region(scene, rng)
                picture = circled(picture, placed.box)
                turns.append(Turn("region", fact.question, fact.answer))
        return {
            "picture": picture,
            "turns": [(turn.question, turn.answer) for turn in turns],
            "kinds": [turn.kind for turn in turns],
            "scene": scene,
            "patch_names": patch_names(scene, PATCH),
        }
