"""Lettered questions about a scene, in the prompt forms of SEED, MMBench, ScienceQA and Q-Bench.

A `Choice` is the question, its options and the index of the right one, whose letter is uniform. The
texts are in English, or in Chinese for the few topics MMBench-CN is imitated with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from etcbench.micro.artwork import sprites
from etcbench.micro.questions import (
    Fact,
    all_words,
    alone,
    name_counts,
    pick,
    plural_of,
    related,
    trainable,
    unique,
    words,
)
from etcbench.micro.scenes import BACKGROUNDS, Scene

LETTERS = "ABCDE"
LETTER = "Answer with the option's letter from the given choices directly."
LETTER_ZH = "请直接回答选项字母。"
ONE_OF = "Choose between one of the options as follows:"
HINTS = ("The picture shows one or more objects.", "Every object belongs to one kind.")
DEFECTS = {
    "none": "No distortion",
    "blur": "Blur",
    "noise": "Noise",
    "dark": "Underexposure",
    "bright": "Overexposure",
}
CHINESE = {
    "red": "红色",
    "green": "绿色",
    "blue": "蓝色",
    "yellow": "黄色",
    "purple": "紫色",
    "gray": "灰色",
    "brown": "棕色",
    "white": "白色",
    "animal": "动物",
    "bird": "鸟类",
    "insect": "昆虫",
    "fruit": "水果",
    "vegetable": "蔬菜",
    "food": "食物",
    "drink": "饮料",
    "vehicle": "车辆",
    "sport": "运动",
    "tool": "工具",
    "clothing": "衣物",
    "plant": "植物",
    "instrument": "乐器",
    "device": "设备",
    "item": "物品",
    "sign": "标志",
    "top left": "左上角",
    "top right": "右上角",
    "bottom left": "左下角",
    "bottom right": "右下角",
}


@dataclass(frozen=True)
class Choice:
    """A question with options; ``answer`` is the index of the right one."""

    topic: str
    question: str
    options: tuple[str, ...]
    answer: int

    @property
    def letter(self) -> str:
        """The gold letter."""
        return LETTERS[self.answer]

    @property
    def lines(self) -> str:
        """The options as lettered lines."""
        return "\n".join(f"{LETTERS[i]}. {option}" for i, option in enumerate(self.options))

    def rotated(self, steps: int) -> Choice:
        """Move the options on by ``steps`` places."""
        n = len(self.options)
        options = tuple(self.options[(i - steps) % n] for i in range(n))
        return Choice(self.topic, self.question, options, (self.answer + steps) % n)


Build = Callable[[Scene, np.random.Generator, int], Choice | None]


def _among(
    rng: np.random.Generator, topic: str, question: str, gold: str, wrong: Sequence[str], n: int
) -> Choice:
    others = sorted(set(wrong) - {gold})
    chosen = [others[i] for i in rng.permutation(len(others))[: n - 1]]
    answer = int(rng.integers(len(chosen) + 1))
    return Choice(topic, question, (*chosen[:answer], gold, *chosen[answer:]), answer)


def _names(rng: np.random.Generator, category: str, taken: set[str]) -> list[str]:
    """List wrong names; from the category of the right one half of the time."""
    pool = [s for s in trainable() if s.name not in taken]
    near = [s.name for s in pool if s.category == category]
    return near if len(near) > 4 and rng.random() < 0.5 else [s.name for s in pool]


def present(scene: Scene, rng: np.random.Generator, n: int) -> Choice:
    """Ask which of these objects is there."""
    gold = pick(rng, scene.classes)
    wrong = _names(rng, gold.category, set(name_counts(scene)))
    question = "Which of these objects is present in the picture?"
    return _among(rng, "present", question, gold.name, wrong, n)


def name(scene: Scene, rng: np.random.Generator, n: int) -> Choice | None:
    """Ask what is in a cell; wrong options are what else is there, and more."""
    if not (candidates := alone(scene)):
        return None
    placed = pick(rng, candidates)
    elsewhere = [o.sprite.name for o in scene.objects if o.sprite.name != placed.sprite.name]
    more = _names(rng, placed.sprite.category, {placed.sprite.name})
    extra = [more[i] for i in rng.permutation(len(more))[: n - 1]]
    wrong = list(dict.fromkeys(elsewhere + extra))[: n - 1]
    question = f"What is at the {scene.cell_name(placed.cell)} of the picture?"
    return _among(rng, "name", question, placed.sprite.name, wrong, n)


def kind(scene: Scene, rng: np.random.Generator, n: int) -> Choice | None:
    """Ask which category the object in a cell belongs to."""
    if not (candidates := alone(scene)):
        return None
    placed = pick(rng, candidates)
    categories = [sprite.category for sprite in sprites()]
    question = f"What kind of object is at the {scene.cell_name(placed.cell)} of the picture?"
    return _among(rng, "kind", question, placed.sprite.category, categories, n)


def count(scene: Scene, rng: np.random.Generator, n: int) -> Choice:
    """Ask how many objects of a name there are."""
    counts = name_counts(scene)
    level = pick(rng, sorted(set(counts.values())))
    chosen = pick(rng, sorted(k for k, c in counts.items() if c == level))
    question = f"How many {plural_of(chosen)} are in the picture?"
    return _among(rng, "count", question, str(level), [str(k) for k in range(1, 6)], n)


def where(scene: Scene, rng: np.random.Generator, n: int) -> Choice | None:
    """Ask in which cell the only object of a name is."""
    if not (candidates := unique(scene)):
        return None
    placed = pick(rng, candidates)
    cells = [scene.cell_name(c) for c in range(scene.cells[0] * scene.cells[1])]
    question = f"Where is the {placed.sprite.name} in the picture?"
    return _among(rng, "where", question, scene.cell_name(placed.cell), cells, n)


def relation(scene: Scene, rng: np.random.Generator, n: int) -> Choice | None:
    """Ask how one object lies to another, where only one of the four relations holds clearly."""
    pairs = related(scene)
    clear = [p for p in pairs if sum(q[:2] == p[:2] for q in pairs) == 1]
    if not clear:
        return None
    a, b, how = pick(rng, clear)
    question = f"Where is the {a.sprite.name} relative to the {b.sprite.name}?"
    options = ["to the left of", "to the right of", "above", "below"]
    return _among(rng, "relation", question, how, options, n)


def color(scene: Scene, rng: np.random.Generator, n: int) -> Choice:
    """Ask for the colour of the ground."""
    question = "What color is the background of the picture?"
    return _among(rng, "color", question, scene.background, list(BACKGROUNDS), n)


def word(scene: Scene, rng: np.random.Generator, n: int) -> Choice | None:
    """Ask which word is written."""
    if not (there := words(scene)):
        return None
    wrong = [w for w in all_words() if w not in there]
    return _among(rng, "word", "Which word is written in the picture?", pick(rng, there), wrong, n)


def defect(scene: Scene, rng: np.random.Generator, n: int) -> Choice:
    """Ask which distortion the picture suffers from."""
    question = "Which distortion is visible in the picture?"
    return _among(rng, "defect", question, DEFECTS[scene.distortion], list(DEFECTS.values()), n)


def exposure(scene: Scene, rng: np.random.Generator, _: int) -> Choice:
    """Ask how the picture is exposed."""
    gold = {"dark": "Too dark", "bright": "Too bright"}.get(scene.distortion, "Normal")
    wrong = ["Too dark", "Too bright", "Normal"]
    return _among(rng, "exposure", "How is the exposure of the picture?", gold, wrong, 3)


def sharpness(scene: Scene, rng: np.random.Generator, _: int) -> Choice:
    """Ask how sharp the picture is."""
    gold = "Blurry" if scene.distortion == "blur" else "Sharp"
    question = "How is the sharpness of the picture?"
    return _among(rng, "sharpness", question, gold, ["Blurry", "Sharp"], 2)


BUILD: dict[str, Build] = {
    "present": present,
    "name": name,
    "kind": kind,
    "count": count,
    "where": where,
    "relation": relation,
    "color": color,
    "word": word,
    "defect": defect,
    "exposure": exposure,
    "sharpness": sharpness,
}
GENERAL = ("present", "name", "kind", "count", "where", "relation", "color", "word")
LOW_LEVEL = ("defect", "exposure", "sharpness", "color")


def yes_no(rng: np.random.Generator, fact: Fact) -> Choice:
    """Turn a yes/no fact into a question with the options Yes and No."""
    return _among(rng, fact.kind, fact.question, fact.answer, ["Yes", "No"], 2)


def in_chinese(scene: Scene, rng: np.random.Generator, n: int) -> Choice:
    """Ask in Chinese for the ground's colour, the number of objects or a kind."""
    topic = pick(rng, ("color", "total", "kind"))
    if topic == "kind" and scene.cells == (2, 2) and (candidates := alone(scene)):
        placed = pick(rng, candidates)
        kinds = [CHINESE[sprite.category] for sprite in sprites()]
        question = f"图片{CHINESE[scene.cell_name(placed.cell)]}的物体属于哪一类？"
        return _among(rng, "kind", question, CHINESE[placed.sprite.category], kinds, n)
    if topic == "total":
        counts = [str(k) for k in range(1, 7)]
        return _among(rng, "total", "图片中有几个物体？", str(len(scene.objects)), counts, n)
    colors = [CHINESE[c] for c in BACKGROUNDS]
    return _among(rng, "color", "图片的背景是什么颜色？", CHINESE[scene.background], colors, n)


def lettered(choice: Choice, hint: str = "", last: str = LETTER) -> str:
    """Write the prompt of SEED, MMBench and, with a context line in front, ScienceQA."""
    return f"{hint}{choice.question}\n{choice.lines}\n{last}"


def one_of(choice: Choice) -> str:
    """Write the prompt of Q-Bench; every option line ends with a newline."""
    return f"{choice.question}\n{ONE_OF}\n{choice.lines}\n"


def draw_choice(
    scene: Scene, rng: np.random.Generator, topics: Sequence[str] = GENERAL, options: int = 4
) -> Choice:
    """Draw a question on one of the topics; those the scene does not allow are passed over."""
    for topic in (topics[i] for i in rng.permutation(len(topics))):
        if choice := BUILD[topic](scene, rng, options):
            return choice
    return present(scene, rng, options)
