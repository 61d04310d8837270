"""POPE: is an object in the picture, in three ways of choosing absent ones.

One row: ``Is there a snowboard in the image?``, gold ``yes``; the model reads the question and, on
the next line, ``Answer the question using a single word or phrase.``
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from etcbench.doc import Row
from etcbench.scoring.choices import pope_answer
from etcbench.scoring.statistics import Floats, ratio
from etcbench.task import Breakdown, Doc, HubSource, Parsed, Scored, Task, by_category

CATEGORIES = ("adversarial", "popular", "random")
FIGURES = ("f1", "accuracy", "precision", "recall", "yes_rate")


class Pope(Task):
    """POPE; the headline figures are means over the splits, in ``lmms`` mode over all rows.

    ``official`` takes everything without a no for a yes. ``lmms`` wants the bare word, leaves
    other answers to a "yes" question out of recall and F1, and gives the gold's yes-rate.
    """

    name = "pope"
    columns = ("id", "question_id", "question", "answer", "image_source", "image", "category")
    source = HubSource(("lmms-lab-encoder/POPE", "lmms-lab/POPE"), split="test")
    modes: ClassVar = ("official", "lmms")
    max_new_tokens = 16
    metric = "f1"
    hit_rate = False

    def doc(self, row: Row, index: int) -> Doc:
        """Group by picture: its questions are not independent."""
        return Doc(
            id=str(row["id"]),
            group=str(row["image_source"]),
            pictures=self.pictures(row),
            fields={"question": row["question"], "question_id": str(row["question_id"])},
            gold=str(row["answer"]).strip().lower(),
            categories={"category": str(row["category"])},
        )

    def from_official(self, record: Row, path: Path) -> Row:
        """Rename the fields of ``coco_pope_<category>.json``."""
        if "label" not in record:
            return record
        category = next((name for name in CATEGORIES if name in path.name), path.stem)
        return {
            "id": f"{category}/{record['question_id']}",
            "question_id": record["question_id"],
            "question": record["text"],
            "answer": record["label"],
            "image_source": record["image"],
            "category": category,
        }

    def render(self, doc: Doc, style: str) -> str:
        """Ask as the benchmark does, with the short-answer line in the other two styles."""
        question = doc.fields["question"]
        if style == "official":
            return question
        return f"{question.strip()}\nAnswer the question using a single word or phrase."

    def parse(self, response: str, doc: Doc, mode: str) -> Parsed:
        """Yes or no; unparsed when the text has neither word."""
        if mode == "lmms":
            word = response.lower().strip()
            return Parsed(word, "ok" if word in ("yes", "no") else "unparsed")
        answer, named = pope_answer(response)
        return Parsed(answer, "ok" if named else "unparsed")

    def headline(self, rows: Sequence[Scored], mode: str) -> dict[str, float]:
        """Means over the splits, or figures over all rows in ``lmms`` mode."""
        parts = self._parts(rows, mode).values()
        figures = [_figures(part, mode) for part in parts]
        return {name: sum(f[name] for f in figures) / len(figures) for name in FIGURES}

    def breakdown(self, rows: Sequence[Scored], mode: str) -> Breakdown:
        """Every figure per split and over all rows."""
        parts = by_category(rows)["category"]
        return {
            "category": {name: _figures(part, mode) for name, part in parts.items()},
            "pooled": {"all": _figures(rows, mode)},
        }

    def table(self, rows: Sequence[Scored], mode: str) -> Floats:
        """Count hits, and predicted plus actual positives, per split: F1 is 2 * hits / both."""
        names = list(self._parts(rows, mode))
        table = np.zeros((len(rows), 2 * len(names)))
        for i, row in enumerate(rows):
            column = 0 if mode == "lmms" else 2 * names.index(row.doc.categories["category"])
            said, true = _yes(row, mode)
            table[i, column : column + 2] = (said and true, said + true)
        return table

    def statistic(self, sums: Floats) -> Floats:
        """Mean F1 in percent."""
        return 200 * ratio(sums[:, ::2], sums[:, 1::2]).mean(1)

    def _parts(self, rows: Sequence[Scored], mode: str) -> dict[str, Sequence[Scored]]:
        return {"all": rows} if mode == "lmms" else {**by_category(rows)["category"]}


def _yes(row: Scored, mode: str) -> tuple[bool, bool]:
    """Whether a "yes" was said, and whether the sample counts among those to be found."""
    lost = mode == "lmms" and row.parsed.status == "unparsed"
    return row.parsed.value == "yes", row.doc.gold == "yes" and not lost


def _figures(rows: Sequence[Scored], mode: str) -> dict[str, float]:
    pairs = [_yes(row, mode) for row in rows]
    hits = sum(said and true for said, true in pairs)
    said, true = sum(said for said, _ in pairs), sum(true for _, true in pairs)
    yes = sum(row.doc.gold == "yes" for row in rows) if mode == "lmms" else said
    return {
        "f1": _percent(2 * hits, said + true),
        "accuracy": _percent(sum(row.outcome for row in rows), len(rows)),
        "precision": _percent(hits, said),
        "recall": _percent(hits, true),
        "yes_rate": _percent(yes, len(rows)),
        "n": len(rows),
    }


def _percent(part: float, whole: int) -> float:
    return 100 * part / whole if whole else 0.0


TASK = Pope
