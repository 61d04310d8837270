"""SEED-Bench v1: four choices about a picture or a video (spec tasks 4.3).

One row: ``How many towels are in the image?`` with One, Two, Three, Four, gold ``A``; the model
reads the question, four lines ``A. One`` to ``D. Four`` and ``Answer with the option's letter from
the given choices directly.``
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from etcbench.doc import Row
from etcbench.scoring.choices import seed_letter
from etcbench.scoring.statistics import Floats, Interval
from etcbench.task import UNPARSED, Doc, HubSource, Parsed, Scored, Task, percent

TYPES = (
    "scene understanding", "instance identity", "instance attributes", "instance location",
    "instances counting", "spatial relation", "instance interaction", "visual reasoning",
    "text understanding", "action recognition", "action prediction", "procedure understanding",
)  # fmt: skip


class SeedBench(Task):
    """SEED-Bench; the headline is the image part ("SEED-I"), beside video and all rows.

    Of a video, the middle frame is shown, as in LLaVA's evaluation. ``llava`` wants the letter and
    nothing else, ``lmms`` takes the first character.
    """

    name = "seedbench"
    columns = (
        "question_id", "question", "choice_a", "choice_b", "choice_c", "choice_d", "answer",
        "data_type", "data_id", "question_type_id", "image",
    )  # fmt: skip
    source = HubSource(("lmms-lab-encoder/SEED-Bench", "lmms-lab/SEED-Bench"), split="test")
    styles = ("llava", "lmms")
    modes: ClassVar = ("etcbench", "llava", "lmms")
    max_new_tokens = 16

    def doc(self, row: Row, index: int) -> Doc:
        """Key by row, since a question_id may occur twice; group by picture."""
        key = str(row["question_id"])
        kind = int(row["question_type_id"]) if row.get("question_type_id") else 0
        medium = row.get("data_type") or ("video" if kind > 9 or key.startswith("v") else "image")
        frames = self.pictures(row)
        choices = {x: row.get(f"choice_{x.lower()}") for x in "ABCD"}
        return Doc(
            id=f"{key}#{index}",
            group=str(row.get("data_id") or f"{key}#{index}"),
            pictures=frames[len(frames) // 2 :][:1],
            fields={"question": row.get("question"), "choices": choices, "question_id": key},
            gold=str(row["answer"]).strip().upper(),
            categories={
                "medium": str(medium),
                **({"type": TYPES[kind - 1]} if 1 <= kind <= len(TYPES) else {}),
            },
        )

    def render(self, doc: Doc, style: str) -> str:
        """Write the question, the four choices and the request for a letter."""
        lines = [f"{letter}. {text}" for letter, text in doc.fields["choices"].items()]
        ask = "Answer with the option's letter from the given choices directly."
        return "\n".join([doc.fields["question"], *lines, ask])

    def parse(self, response: str, doc: Doc, mode: str) -> Parsed:
        """Read a letter; the modes of others never fail but on an empty response."""
        if mode == "etcbench":
            letter = seed_letter(response)
        else:
            letter = response if mode == "llava" else response.strip()[:1].upper()
        return Parsed(letter) if letter else UNPARSED

    def headline(self, rows: Sequence[Scored], mode: str) -> dict[str, float]:
        """Accuracy on pictures, on videos and on all rows; a medium without rows is left out."""
        media = {medium: _of(rows, medium) for medium in ("image", "video")}
        parts = {medium: percent(part) for medium, part in media.items() if part}
        return {**parts, "all": percent(rows)}

    def table(self, rows: Sequence[Scored], mode: str) -> Floats:
        """Count the rows of the medium that the headline is about."""
        medium = "image" if _of(rows, "image") else "video"
        counted = np.array([row.doc.categories["medium"] == medium for row in rows], float)
        return np.stack([counted * [row.outcome for row in rows], counted], 1)

    def interval(self, rows: Sequence[Scored], mode: str) -> Interval:
        """Interval of the headline's part only."""
        return super().interval(_of(rows, "image") or rows, mode)


def _of(rows: Sequence[Scored], medium: str) -> list[Scored]:
    return [row for row in rows if row.doc.categories["medium"] == medium]


TASK = SeedBench
