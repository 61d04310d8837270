"""Micro benchmarks with lettered options: SEED-Bench, MMBench, ScienceQA, Q-Bench."""

from __future__ import annotations

from datasets import List

from etcbench.micro import choices
from etcbench.micro.choices import Choice
from etcbench.micro.questions import pick, quality
from etcbench.micro.rows import (
    IMAGE,
    INT,
    INT8,
    INT16,
    TEXT,
    TEXTS,
    Benchmark,
    Pictures,
    Row,
    Shot,
)
from etcbench.micro.scenes import DISTORTIONS

SEED_PICTURES = 100
MMBENCH_PICTURES = 50
SCIENCE_PICTURES = 100
QUALITY_PICTURES = 100
ROTATION = 1_000_000
COMBO_INDEX = 500_000
NOT_A_NUMBER = "nan"  # what the hub's MMBench holds where an option or a hint is absent
ABSENT = "N/A"  # the same for Q-Bench


def _some_choices(shot: Shot, n: int, sizes: tuple[int, ...] = (4,)) -> list[Choice]:
    """Draw up to n choices on different topics."""
    found: dict[str, Choice] = {}
    for _ in range(8 * n):
        size = pick(shot.rng, sizes)
        choice = choices.draw_choice(shot.scene, shot.rng, options=size)
        if choice.topic not in found and len(found) < n:
            found[choice.topic] = choice
    return list(found.values())


# SEED-Bench's own numbering of its image types.
SEED_TYPES = {
    "color": 1,
    "present": 2,
    "name": 2,
    "kind": 3,
    "where": 4,
    "count": 5,
    "relation": 6,
    "word": 9,
}


def seedbench(pictures: Pictures) -> list[Row]:
    """Four questions a picture, four options each."""
    rows: list[Row] = []
    for _ in range(SEED_PICTURES):
        shot = pictures.draw()
        for choice in _some_choices(shot, 4):
            rows.append(
                {
                    "answer": choice.letter,
                    **{f"choice_{'abcd'[i]}": text for i, text in enumerate(choice.options)},
                    "data_id": shot.name,
                    "data_type": "image",
                    "question": choice.question,
                    "question_id": str(len(rows)),
                    "question_type_id": SEED_TYPES[choice.topic],
                    "image": [shot.image],
                    "segment": [],
                }
            )
    return rows


MMBENCH_CATEGORIES = {
    "present": ("image_topic", "coarse_perception"),
    "color": ("image_scene", "coarse_perception"),
    "name": ("object_localization", "finegrained_perception (instance-level)"),
    "where": ("object_localization", "finegrained_perception (instance-level)"),
    "count": ("attribute_recognition", "finegrained_perception (instance-level)"),
    "total": ("attribute_recognition", "finegrained_perception (instance-level)"),
    "word": ("ocr", "finegrained_perception (instance-level)"),
    "relation": ("spatial_relationship", "finegrained_perception (cross-instance)"),
    "kind": ("identity_reasoning", "attribute_reasoning"),
}


def _rotations(choice: Choice, index: int, hint: str, shot: Shot) -> list[Row]:
    category, level2 = MMBENCH_CATEGORIES[choice.topic]
    rows: list[Row] = []
    for step in range(len(choice.options)):
        turned = choice.rotated(step)
        texts = [*turned.options, *[NOT_A_NUMBER] * 4][:4]
        rows.append(
            {
                "index": step * ROTATION + index,
                "question": choice.question,
                "hint": hint,
                **dict(zip("ABCD", texts, strict=True)),
                "answer": turned.letter,
                "category": category,
                "L2-category": level2,
                "source": "micro",
                "comment": NOT_A_NUMBER,
                "split": "dev",
                "image": shot.image,
            }
        )
    return rows


def _index(shot: Shot, number: int) -> int:
    return number + (COMBO_INDEX if shot.name.startswith("combo") else 0)


def mmbench(pictures: Pictures) -> list[Row]:
    """Two questions a picture, asked once per rotation; all originals come first."""
    rows: list[Row] = []
    number = 0
    for _ in range(MMBENCH_PICTURES):
        shot = pictures.draw()
        for choice in _some_choices(shot, 2, (4, 4, 3, 2)):
            hint = pick(shot.rng, choices.HINTS) if shot.rng.random() < 0.2 else NOT_A_NUMBER
            rows += _rotations(choice, _index(shot, number), hint, shot)
            number += 1
    return sorted(rows, key=lambda row: row["index"] // ROTATION)


def mmbench_cn(pictures: Pictures) -> list[Row]:
    """Two Chinese questions a picture, asked once per rotation."""
    rows: list[Row] = []
    number = 0
    for _ in range(MMBENCH_PICTURES):
        shot = pictures.draw()
        drawn = [choices.in_chinese(shot.scene, shot.rng, 4) for _ in range(6)]
        for choice in list({choice.question: choice for choice in drawn}.values())[:2]:
            rows += _rotations(choice, _index(shot, number), NOT_A_NUMBER, shot)
            number += 1
    return sorted(rows, key=lambda row: row["index"] // ROTATION)


SUBJECTS = {"word": "language science", "color": "social science"}


def scienceqa(pictures: Pictures) -> list[Row]:
    """Three questions a picture with two to five options; half of them with a context line."""
    rows: list[Row] = []
    for _ in range(SCIENCE_PICTURES):
        shot = pictures.draw()
        for choice in _some_choices(shot, 3, (2, 3, 4, 5)):
            hint = pick(shot.rng, choices.HINTS) if shot.rng.random() < 0.5 else ""
            rows.append(
                {
                    "image": shot.image,
                    "question": choice.question,
                    "choices": list(choice.options),
                    "answer": choice.answer,
                    "hint": hint,
                    "task": "closed choice",
                    "grade": "grade2",
                    "subject": SUBJECTS.get(choice.topic, "natural science"),
                    "topic": choice.topic,
                    "category": choice.topic,
                    "skill": choice.topic,
                    "lecture": "",
                    "solution": "",
                }
            )
    return rows


QUALITY_TYPES = {"quality": 0, "defect": 1, "color": 1, "exposure": 2, "sharpness": 2}
QUALITY_CONCERNS = {"color": 1}


def qbench(pictures: Pictures) -> list[Row]:
    """Three questions a picture; all distortions, and none, come equally often."""
    rows: list[Row] = []
    for number in range(QUALITY_PICTURES):
        shot = pictures.draw(distortion=DISTORTIONS[number % len(DISTORTIONS)])
        clear = shot.scene.distortion == "none"
        fact = quality(shot.scene, shot.rng, False if clear else None)
        assert fact is not None
        topics = [choices.LOW_LEVEL[i] for i in shot.rng.permutation(len(choices.LOW_LEVEL))[:2]]
        drawn = [choices.BUILD[topic](shot.scene, shot.rng, 4) for topic in topics]
        for choice in [choices.yes_no(shot.rng, fact), *drawn]:
            assert choice is not None
            texts = [*choice.options, *[ABSENT] * 4][:4]
            rows.append(
                {
                    "id": f"{shot.name}_{choice.topic}",
                    "image": shot.image,
                    "question": choice.question,
                    **{f"option{i}": text for i, text in enumerate(texts)},
                    "question_type": QUALITY_TYPES[choice.topic],
                    "question_concern": QUALITY_CONCERNS.get(choice.topic, 0),
                    "correct_choice": choice.letter,
                }
            )
    return rows


_MMBENCH = {
    "index": INT,
    "question": TEXT,
    "hint": TEXT,
    **dict.fromkeys("ABCD", TEXT),
    "answer": TEXT,
    "category": TEXT,
    "L2-category": TEXT,
    "source": TEXT,
    "comment": TEXT,
    "split": TEXT,
    "image": IMAGE,
}
LETTERED = {
    "seedbench": Benchmark(
        {
            "answer": TEXT,
            **{f"choice_{letter}": TEXT for letter in "abcd"},
            "data_id": TEXT,
            "data_type": TEXT,
            "question": TEXT,
            "question_id": TEXT,
            "question_type_id": INT16,
            "image": List(IMAGE),
            "segment": List(INT),
        },
        seedbench,
    ),
    "mmbench": Benchmark(_MMBENCH, mmbench),
    "mmbench_cn": Benchmark(_MMBENCH, mmbench_cn),
    "scienceqa": Benchmark(
        {
            "image": IMAGE,
            "question": TEXT,
            "choices": TEXTS,
            "answer": INT8,
            "hint": TEXT,
            **dict.fromkeys(
                ("task", "grade", "subject", "topic", "category", "skill", "lecture", "solution"),
                TEXT,
            ),
        },
        scienceqa,
    ),
    "qbench": Benchmark(
        {
            "id": TEXT,
            "image": IMAGE,
            "question": TEXT,
            **{f"option{i}": TEXT for i in range(4)},
            "question_type": INT,
            "question_concern": INT,
            "correct_choice": TEXT,
        },
        qbench,
    ),
}
