"""Q-Bench A1 (LLVisionQA): low-level quality questions on one picture (spec tasks 4.6).

One row: ``How is the lighting of this building?`` with High, Low and Medium, gold ``B``; the model
reads the question, ``Choose between one of the options as follows:`` and the lines ``A. High`` to
``C. Medium``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from etcbench.doc import Row
from etcbench.scoring.choices import mmbench_vlmeval, qbench_lmms
from etcbench.task import (
    UNPARSED,
    Breakdown,
    Doc,
    HubSource,
    Parsed,
    Scored,
    Task,
    by_category,
    percent,
)

TYPES = ("Yes-or-No", "What", "How")
CONCERNS = ("distortion", "other", "in-context distortion", "in-context other")


class QBench(Task):
    """Q-Bench dev; free text is read by MMBench's current rules, an unread one is wrong."""

    name = "qbench"
    columns = (
        "id", "image", "question", "option0", "option1", "option2", "option3",
        "question_type", "question_concern", "correct_choice",
    )  # fmt: skip
    source = HubSource(("q-future/Q-Bench-HF",), split="dev")
    modes: ClassVar = ("etcbench", "lmms")
    max_new_tokens = 32

    def doc(self, row: Row, index: int) -> Doc:
        """Letter the options; ``N/A`` ends them."""
        texts = [row.get(f"option{k}") for k in range(4)]
        choices = {x: str(t) for x, t in zip("ABCD", texts, strict=True) if t not in (None, "N/A")}
        return Doc(
            id=str(row["id"]),
            group=str(row["id"]),
            pictures=self.pictures(row),
            fields={
                "question": row["question"], "choices": choices, "question_id": str(row["id"]),
            },
            gold=str(row["correct_choice"]).strip(),
            categories={
                "question_type": _name(row["question_type"], TYPES),
                "question_concern": _name(row["question_concern"], CONCERNS),
            },
        )  # fmt: skip

    def from_official(self, record: Row, path: Path) -> Row:
        """Letter the candidates of LLVisionQA; the picture's file and the question are the id."""
        if "candidates" not in record:
            return record
        texts = list(record["candidates"])
        return {
            **{f"option{k}": text for k, text in enumerate(texts)},
            "id": f"{record['img_path']}|{record['question']}",
            "question": record["question"],
            "question_type": record["type"],
            "question_concern": record["concern"],
            "correct_choice": "ABCD"[texts.index(record["correct_ans"])],
        }

    def render(self, doc: Doc, style: str) -> str:
        """Write the question and its options; every line ends with a newline but in no style."""
        question = doc.fields["question"]
        lines = "".join(f"{x}. {text}\n" for x, text in doc.fields["choices"].items())
        if style == "lmms":
            ask = "Answer with the option's letter from the given choices directly.\n"
            return f"{question}\n{lines}{ask}"
        return f"{question}\nChoose between one of the options as follows:\n{lines}"

    def parse(self, response: str, doc: Doc, mode: str) -> Parsed:
        """Infer a letter; where lmms-eval would draw at random, none."""
        rule = qbench_lmms if mode == "lmms" else mmbench_vlmeval
        letter = rule(response, doc.fields["choices"])
        return UNPARSED if letter is None else Parsed(letter)

    def headline(self, rows: Sequence[Scored], mode: str) -> dict[str, float]:
        """Accuracy, and what uniform guessing would score."""
        return {self.metric: percent(rows), "chance": _chance(rows)}

    def breakdown(self, rows: Sequence[Scored], mode: str) -> Breakdown:
        """Accuracy, chance level and n per question type and concern."""
        found = super().breakdown(rows, mode)
        for kind, parts in by_category(rows).items():
            for value, part in parts.items():
                found[kind][value]["chance"] = _chance(part)
        return found


def _chance(rows: Sequence[Scored]) -> float:
    return 100 * math.fsum(1 / len(row.doc.fields["choices"]) for row in rows) / len(rows)


def _name(code: int | str, names: tuple[str, ...]) -> str:
    text = str(code)
    return names[int(text)] if text.isdecimal() and int(text) < len(names) else text


TASK = QBench
