"""ScienceQA: school questions with two to five choices (spec tasks 4.4).

One row: ``Which of these states is farthest north?`` with West Virginia, Louisiana, Arizona and
Oklahoma, gold ``A``; the model reads the question, a line ``A. West Virginia`` and so on for each
choice, and ``Answer with the option's letter from the given choices directly.``
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from etcbench.doc import Docs, Row
from etcbench.scoring.choices import scienceqa_letter, scienceqa_letter_lmms
from etcbench.task import UNPARSED, Breakdown, Doc, HubSource, Parsed, Scored, Task, percent

LETTERS = "ABCDE"


class ScienceQa(Task):
    """ScienceQA test: the problems with a picture, or all of them.

    Parameters
    ----------
    full : bool
        All 4,241 problems instead of the 2,017 with a picture.
    """

    name = "scienceqa"
    columns = ("image", "question", "choices", "answer", "hint")
    styles = ("llava", "lmms", "official", "qwen_vl")
    modes: ClassVar = ("llava", "lmms")
    variants: ClassVar = {"img": {"full": False}, "full": {"full": True}}
    max_new_tokens = 16

    def __init__(self, full: bool = False) -> None:
        self.full = full
        config = "ScienceQA-FULL" if full else "ScienceQA-IMG"
        self.source = HubSource(("lmms-lab-encoder/ScienceQA", "lmms-lab/ScienceQA"), config)
        self.name = "scienceqa_full" if full else "scienceqa"

    def choose(self, docs: Docs) -> Docs:
        """Leave out the problems without a picture unless all are wanted."""
        if self.full:
            return docs
        return docs.rows(i for i, image in enumerate(docs.table["image"]) if image is not None)

    def doc(self, row: Row, index: int) -> Doc:
        """Take the problem's id if the file has one, else its place."""
        key = str(row.get("id", index))
        hint = (row.get("hint") or "").strip()
        has_image = row.get("has_image", row.get("image") is not None or not self.full)
        context = [name for name, there in (("text", hint), ("image", has_image)) if there]
        grade = str(row.get("grade") or "").removeprefix("grade")
        categories = {"context": "+".join(context) or "none"}
        if row.get("subject"):
            categories["subject"] = str(row["subject"])
        if grade.isdecimal():
            categories["grade"] = "1-6" if int(grade) <= 6 else "7-12"
        return Doc(
            id=key,
            group=key,
            pictures=self.pictures(row),
            fields={
                "question": row.get("question"),
                "choices": tuple(row["choices"]),
                "hint": row.get("hint") or "",
                "question_id": key,
            },
            gold=LETTERS[int(row["answer"])],
            categories=categories,
        )

    def from_official(self, record: Row, path: Path) -> Row | None:
        """Take test problems by id; an answer may be an index or, with `n_choices`, a letter."""
        if record.get("split", "test") != "test":
            return None
        choices = record.get("choices") or [""] * int(record["n_choices"])
        answer = record["answer"]
        index = LETTERS.index(answer) if isinstance(answer, str) else answer
        has_image = record.get("has_image", bool(record.get("image")))
        if not (self.full or has_image):
            return None
        return {
            **record,
            "choices": choices,
            "answer": index,
            "has_image": has_image,
            "image": None,
        }

    def render(self, doc: Doc, style: str) -> str:
        """Write context, question, lettered choices and what to answer with."""
        question, hint, choices = (doc.fields[name] for name in ("question", "hint", "choices"))
        lettered = list(zip(LETTERS, choices, strict=False))
        lines = "\n".join(f"{letter}. {text}" for letter, text in lettered)
        if style == "official":
            options = " ".join(f"({letter}) {text}" for letter, text in lettered)
            return f"Question: {question}\nContext: {hint or 'N/A'}\nOptions: {options}\nAnswer:"
        if style == "qwen_vl":
            return f"Context: {hint or 'N/A'}\nQuestion: {question}\nOptions: {lines}\nAnswer:"
        context = f"Context: {hint}\n" if hint else ""
        ask = "Answer with the option's letter from the given choices directly."
        text = f"{context}{question}\n{lines}\n{ask}"
        return text.replace("  ", " ") if style == "llava" else text

    def parse(self, response: str, doc: Doc, mode: str) -> Parsed:
        """Read a letter; one beyond the choices is wrong but read."""
        letter = (scienceqa_letter_lmms if mode == "lmms" else scienceqa_letter)(response)
        return UNPARSED if letter is None else Parsed(letter)

    def headline(self, rows: Sequence[Scored], mode: str) -> dict[str, float]:
        """Accuracy on problems with a picture and, in the full variant first, on all."""
        pictured = [row for row in rows if "image" in row.doc.categories["context"]]
        img = {"img": percent(pictured)} if pictured else {}
        return {"full": percent(rows), **img} if self.full or not img else img

    def breakdown(self, rows: Sequence[Scored], mode: str) -> Breakdown:
        """Per subject, grade and context; a problem with text and picture counts under both."""
        found = super().breakdown(rows, mode)
        parts = {}
        for name in ("text", "image", "none"):
            part = [row for row in rows if name in row.doc.categories["context"].split("+")]
            if part:
                parts[name] = {self.metric: percent(part), "n": float(len(part))}
        return {**found, "context": parts}


TASK = ScienceQa
