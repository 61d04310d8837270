"""VQAv2: open questions with ten people's answers each (spec tasks 4.5).

One row: ``What is the man holding?``, gold ten answers such as nine times ``phone`` and once
``cell phone``; the model reads the question and, on the next line, ``Answer the question using a
single word or phrase.``
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from sys import intern
from typing import ClassVar

from etcbench.doc import Row
from etcbench.errors import UsageError
from etcbench.scoring.answers import consensus, evalai_norm, lmms_vqa_norm, official_vqa
from etcbench.task import Doc, Docs, HubSource, Pairs, Parsed, Scored, Task

SUBSET = 16_000


class Vqav2(Task):
    """VQAv2 validation, on a fixed subset of 16,000 questions unless `full`.

    ``official`` scores the raw text, the default normalises it first as LLaVA does, ``lmms``
    normalises both sides even where all people agree.

    Parameters
    ----------
    full : bool
        Use all 214,354 questions.
    """

    name = "vqav2"
    columns = ("question_id", "image_id", "question", "answers", "answer_type", "image")
    source = HubSource(("lmms-lab-encoder/VQAv2", "lmms-lab/VQAv2"), split="validation")
    modes: ClassVar = ("official+prenorm", "official", "lmms")
    variants: ClassVar = {"full": {"full": True}}
    max_new_tokens = 16

    def __init__(self, full: bool = False) -> None:
        self.full = full

    def choose(self, docs: Docs) -> Docs:
        """Keep the questions whose ids have the smallest hashes: the same ones everywhere."""
        if self.full or len(docs) <= SUBSET:
            return docs
        hashes = [hashlib.sha256(str(q).encode()).digest() for q in docs.table["question_id"]]
        return docs.rows(sorted(range(len(hashes)), key=hashes.__getitem__)[:SUBSET])

    def doc(self, row: Row, index: int) -> Doc:
        """Group by picture; gold is the tuple of raw answers, empty where they are not public."""
        answers = row.get("answers") or ()
        return Doc(
            id=str(row["question_id"]),
            group=str(row.get("image_id", row["question_id"])),
            pictures=self.pictures(row),
            fields={"question": row.get("question", ""), "question_id": row["question_id"]},
            gold=tuple(intern(str(a["answer"] if isinstance(a, dict) else a)) for a in answers),
            categories={
                kind: str(row[kind]) for kind in ("answer_type", "question_type") if row.get(kind)
            },
        )

    def render(self, doc: Doc, style: str) -> str:
        """Ask for a word or phrase; the official style is the question alone."""
        if style == "official":
            return doc.fields["question"]
        return f"{doc.fields['question']}\nAnswer the question using a single word or phrase."

    def parse(self, response: str, doc: Doc, mode: str) -> Parsed:
        """Normalise as the mode says; blank text names no answer."""
        if mode == "official+prenorm":
            text = evalai_norm(response)
        else:
            text = lmms_vqa_norm(response) if mode == "lmms" else response
        return Parsed(text, "ok" if response.strip() else "unparsed")

    def outcome(self, parsed: Parsed, doc: Doc, mode: str) -> float:
        """Agreement with the ten answers."""
        if not doc.gold:
            raise UsageError(
                f"vqav2: question {doc.id} has no public answers; write a submission file instead"
            )
        if mode == "lmms":
            return consensus(parsed.value, [lmms_vqa_norm(answer) for answer in doc.gold])
        return official_vqa(parsed.value, doc.gold)

    def notes(self, rows: Sequence[Scored], mode: str) -> tuple[str, ...]:
        """Say when the figure is of the subset."""
        if len(rows) == SUBSET and not self.full:
            return (f"fixed subset of {SUBSET:,} questions",)
        return ()


def write_submission(pairs: Pairs, path: Path) -> None:
    """Write the json file that the test server takes: normalised answers, "" for missing ones."""
    entries = [
        {"question_id": doc.fields["question_id"], "answer": evalai_norm(response or "")}
        for doc, response in pairs
    ]
    path.write_text(json.dumps(sorted(entries, key=lambda entry: entry["question_id"])))


TASK = Vqav2
