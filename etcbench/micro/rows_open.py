"""Micro benchmarks with yes/no and short answers: MME, POPE, VQAv2, GQA, TextVQA."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from datasets import List, Value

from etcbench.micro import questions as ask
from etcbench.micro.artwork import Sprite
from etcbench.micro.questions import Fact, pick
from etcbench.micro.rows import (
    IMAGE,
    INT,
    INT32,
    TEXT,
    TEXTS,
    Benchmark,
    Pictures,
    Row,
    Shot,
)
from etcbench.micro.scenes import Policy, Scene

MME_PICTURES = 40
POPE_PICTURES = 40
VQA_PICTURES = 72
GQA_PICTURES = 60
TEXT_PICTURES = 140
UNANIMOUS_SHARE = 0.65


def _exist_mme(scene: Scene, rng: np.random.Generator, yes: bool | None) -> Fact:
    return ask.exist(scene, rng, yes, ("Is there {} in this image?",))


def _position_mme(scene: Scene, rng: np.random.Generator, yes: bool | None) -> Fact | None:
    # Relations are harder than places; with both, the subtask is at neither end of the scale.
    return (ask.relation if len(scene.objects) % 2 else ask.at_cell)(scene, rng, yes)


MME: dict[str, tuple[Callable[..., Fact | None], Callable[[Scene], object]]] = {
    "existence": (_exist_mme, bool),
    "count": (ask.count_yes_no, lambda scene: len(scene.objects) > 1),
    "position": (_position_mme, lambda scene: len(scene.objects) % 2 == 0 or ask.related(scene)),
    "color": (ask.color_yes_no, bool),
    "OCR": (ask.word_yes_no, ask.words),
}


def mme(pictures: Pictures) -> list[Row]:
    """Two rows per picture, one Yes and one No, in random order."""
    rows: list[Row] = []
    for category, (question, wanted) in MME.items():
        for _ in range(MME_PICTURES):
            shot = pictures.draw(wanted)
            facts = [question(shot.scene, shot.rng, yes) for yes in (True, False)]
            for i in shot.rng.permutation(2):
                fact = facts[i]
                assert fact is not None
                rows.append(
                    {
                        "question_id": f"{category}/{shot.image['path']}",
                        "image": shot.image,
                        "question": f"{fact.question} Please answer yes or no.",
                        "answer": fact.answer,
                        "category": category,
                    }
                )
    return rows


def _absent(shot: Shot, how: str, frequency: Counter[str]) -> list[Sprite]:
    names = ask.name_counts(shot.scene)
    missing = [s for s in ask.trainable() if s.name not in names and not s.word]
    shuffled = [missing[i] for i in shot.rng.permutation(len(missing))]
    if how == "popular":
        return sorted(shuffled, key=lambda s: -frequency[s.name])[:2]
    if how == "adversarial":
        kinds = {placed.sprite.category for placed in shot.scene.objects}
        return sorted(shuffled, key=lambda s: s.category not in kinds)[:2]
    return shuffled[:2]


def pope(pictures: Pictures) -> list[Row]:
    """Two present and two absent objects per picture and category.

    ``popular`` asks for the most frequent absent objects of the file, ``adversarial`` for absent
    ones of a kind that is there (objects of this world do not co-occur by habit), ``random`` for
    any.
    """
    shots = [
        pictures.draw(lambda scene: len(ask.name_counts(scene)) >= 2) for _ in range(POPE_PICTURES)
    ]
    frequency = Counter(o.sprite.name for shot in shots for o in shot.scene.objects)
    rows: list[Row] = []
    for category in ("adversarial", "popular", "random"):
        first = len(rows)
        for shot in shots:
            there = list({s.name: s for s in shot.scene.classes}.values())
            present = [there[i] for i in shot.rng.permutation(len(there))[:2]]
            asked = [(s, "yes") for s in present]
            asked += [(s, "no") for s in _absent(shot, category, frequency)]
            for i in shot.rng.permutation(len(asked)):
                sprite, answer = asked[i]
                rows.append(
                    {
                        "id": str(len(rows)),
                        "question_id": str(len(rows) - first + 1),
                        "question": f"Is there {sprite.with_article} in the image?",
                        "answer": answer,
                        "image_source": shot.name,
                        "image": shot.image,
                        "category": category,
                    }
                )
    return rows


VQA_TYPES = {
    "exist": "is there a",
    "at_cell": "is there a",
    "color_yes_no": "is there a",
    "count_yes_no": "are there",
    "quality": "is this",
    "rel": "is the",
    "count": "how many",
    "total": "how many",
    "name": "what is",
    "kind": "what kind of",
    "pos": "where is the",
    "color": "what color is the",
    "word": "what",
}
VQA_KINDS = (
    ("exist", "exist", "at_cell", "color_yes_no", "count_yes_no", "quality"),
    ("count", "total"),
    ("name", "color", "kind", "pos", "word"),
)
VQA_ANSWER_TYPES = ("yes/no", "number", "other")
NUMBERS = ("none", "one", "two", "three", "four", "five", "six")


def _some_facts(shot: Shot, kinds: Sequence[str], n: int) -> list[Fact]:
    """Draw up to n different questions of the given kinds."""
    found: dict[str, Fact] = {}
    for _ in range(8 * n):
        fact = ask.ASK[pick(shot.rng, kinds)](shot.scene, shot.rng, None)
        if fact and fact.question not in found and len(found) < n:
            found[fact.question] = fact
    return list(found.values())


def _ten(fact: Fact, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Ten answers: unanimous, or with another spelling, or with one to three dissenters."""
    gold = fact.answer.lower()
    answers, sure = [gold] * 10, ["yes"] * 10
    form = rng.random()
    if form > UNANIMOUS_SHARE:
        if gold in ("yes", "no"):
            other, dissent = gold.capitalize(), "no" if gold == "yes" else "yes"
        elif gold.isdigit():
            other, dissent = NUMBERS[int(gold)], str(int(gold) + 1)
        else:
            other, dissent = f"the {gold}", pick(rng, [s.name for s in ask.trainable()])
        spelling = form > (1 + UNANIMOUS_SHARE) / 2
        for i in rng.permutation(10)[: int(rng.integers(1, 4))]:
            answers[i] = other if spelling else dissent
            sure[i] = "yes" if spelling else "maybe"
    return [
        {"answer": answer, "answer_confidence": confidence, "answer_id": i + 1}
        for i, (answer, confidence) in enumerate(zip(answers, sure, strict=True))
    ]


def vqav2(pictures: Pictures) -> list[Row]:
    """Five or six questions a picture; one picture in ten shows an object never trained on."""
    rows: list[Row] = []
    for _ in range(VQA_PICTURES):
        shot = pictures.draw()
        held_out = any(o.sprite.held_out for o in shot.scene.objects)
        number = 0
        for kinds, answer_type, n in zip(VQA_KINDS, VQA_ANSWER_TYPES, (2, 1, 3), strict=True):
            # A held-out object has no name the model could know, but it can be counted and placed.
            known = [k for k in kinds if k in ("total", "color", "color_yes_no")]
            for fact in _some_facts(shot, known if held_out else kinds, n):
                rows.append(
                    {
                        "question_type": VQA_TYPES[fact.kind],
                        "multiple_choice_answer": fact.answer.lower(),
                        "answers": _ten(fact, shot.rng),
                        "image_id": shot.number,
                        "answer_type": answer_type,
                        "question_id": shot.number * 1000 + number,
                        "question": fact.question,
                        "image": shot.image,
                    }
                )
                number += 1
    return rows


GQA_TYPES = {
    "exist": ("verify", "obj"),
    "at_cell": ("verify", "rel"),
    "rel": ("verify", "rel"),
    "color_yes_no": ("verify", "global"),
    "color": ("query", "global"),
    "name": ("query", "obj"),
    "kind": ("query", "cat"),
    "pos": ("query", "rel"),
}


def gqa(pictures: Pictures) -> list[Row]:
    """Five questions a picture; one file, with the picture joined to the instructions' columns."""
    rows: list[Row] = []
    for _ in range(GQA_PICTURES):
        shot = pictures.draw()
        for fact in _some_facts(shot, list(GQA_TYPES), 5):
            structural, semantic = GQA_TYPES[fact.kind]
            rows.append(
                {
                    "id": f"{shot.number}{len(rows):04d}",
                    "imageId": shot.name,
                    "question": fact.question,
                    "answer": fact.answer.lower(),
                    "fullAnswer": fact.answer.lower(),
                    "isBalanced": True,
                    "groups": {"global": "", "local": fact.kind},
                    "entailed": "",
                    "equivalent": "",
                    "types": {
                        "detailed": fact.kind,
                        "semantic": semantic,
                        "structural": structural,
                    },
                    "semanticStr": fact.kind,
                    "image": shot.image,
                }
            )
    return rows


def _two_words(scene: Scene) -> bool:
    return len(ask.words(scene)) > 1


def textvqa(pictures: Pictures) -> list[Row]:
    """Ask what is written; every second picture holds two words, so that the place matters."""
    rows: list[Row] = []
    for number in range(TEXT_PICTURES):
        least = 1 + number % 2
        shot = pictures.draw(ask.words if least == 1 else _two_words)
        for fact in _some_facts(shot, ["word"], least):
            height, width = shot.scene.size
            rows.append(
                {
                    "image_id": shot.name,
                    "question_id": len(rows),
                    "question": fact.question,
                    "question_tokens": fact.question.lower().rstrip("?").split(),
                    "image": shot.image,
                    "image_width": width,
                    "image_height": height,
                    "flickr_original_url": "",
                    "flickr_300k_url": "",
                    "answers": [answer["answer"] for answer in _ten(fact, shot.rng)],
                    "image_classes": sorted(ask.name_counts(shot.scene)),
                    "set_name": "val",
                    "ocr_tokens": ask.words(shot.scene),
                }
            )
    return rows


_ANSWER = {"answer": TEXT, "answer_confidence": TEXT, "answer_id": INT}
_WITH_OBJECTS: tuple[Policy, ...] = ("iid", "iid", "combo") * 3 + ("objects",)
OPEN = {
    "mme": Benchmark(
        {"question_id": TEXT, "image": IMAGE, "question": TEXT, "answer": TEXT, "category": TEXT},
        mme,
    ),
    "pope": Benchmark(
        {
            "id": TEXT,
            "question_id": TEXT,
            "question": TEXT,
            "answer": TEXT,
            "image_source": TEXT,
            "image": IMAGE,
            "category": TEXT,
        },
        pope,
    ),
    "vqav2": Benchmark(
        {
            "question_type": TEXT,
            "multiple_choice_answer": TEXT,
            "answers": List(_ANSWER),
            "image_id": INT,
            "answer_type": TEXT,
            "question_id": INT,
            "question": TEXT,
            "image": IMAGE,
        },
        vqav2,
        _WITH_OBJECTS,
    ),
    "gqa": Benchmark(
        {
            "id": TEXT,
            "imageId": TEXT,
            "question": TEXT,
            "answer": TEXT,
            "fullAnswer": TEXT,
            "isBalanced": Value("bool"),
            "groups": {"global": TEXT, "local": TEXT},
            "entailed": TEXT,
            "equivalent": TEXT,
            "types": {"detailed": TEXT, "semantic": TEXT, "structural": TEXT},
            "semanticStr": TEXT,
            "image": IMAGE,
        },
        gqa,
    ),
    "textvqa": Benchmark(
        {
            "image_id": TEXT,
            "question_id": INT32,
            "question": TEXT,
            "question_tokens": TEXTS,
            "image": IMAGE,
            "image_width": INT32,
            "image_height": INT32,
            "flickr_original_url": TEXT,
            "flickr_300k_url": TEXT,
            "answers": TEXTS,
            "image_classes": TEXTS,
            "set_name": TEXT,
            "ocr_tokens": TEXTS,
        },
        textvqa,
    ),
}
