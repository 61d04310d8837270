"""GQA: compositional questions with one short answer, test-dev balanced (spec tasks 4.8).

One row: ``Is it overcast?``, gold ``no``; the model reads the question and, on the next line,
``Answer the question using a single word or phrase.``
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any, ClassVar

from etcbench.doc import Row
from etcbench.task import Doc, HubSource, Parsed, Task

IDS = ("lmms-lab-encoder/GQA", "lmms-lab/GQA")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Gqa(Task):
    """GQA; ``official`` is plain equality, ``llava`` lower-cases and drops trailing periods.

    The default strips and then applies LLaVA's rule; ``lmms`` drops all ASCII punctuation on both
    sides. A local file holds the picture in the row (columns of the instructions plus ``image``).
    """

    name = "gqa"
    columns = ("id", "imageId", "question", "answer", "image")
    source = HubSource(IDS, "testdev_balanced_instructions", "testdev")
    images: ClassVar = HubSource(IDS, "testdev_balanced_images", "testdev")
    modes: ClassVar = ("etcbench", "official", "llava", "lmms")
    max_new_tokens = 16

    def open_hub(self, split: str, revision: str | None) -> tuple[Any, str]:
        """Join the questions with the pictures, which the hub keeps apart."""
        from etcbench.loading import JoinedTable, open_hub

        questions, identity = open_hub(self.source, split, revision)
        pictures, _ = open_hub(self.images, split, revision)
        return JoinedTable(questions, pictures, key="imageId", picture_key="id"), identity

    def doc(self, row: Row, index: int) -> Doc:
        """Group by picture."""
        kinds = row.get("types")
        kinds = kinds if isinstance(kinds, Mapping) else {}
        return Doc(
            id=str(row["id"]),
            group=str(row.get("imageId", row["id"])),
            pictures=self.pictures(row),
            fields={"question": row["question"], "question_id": str(row["id"])},
            gold=str(row["answer"]),
            categories={k: str(kinds[k]) for k in ("structural", "semantic") if kinds.get(k)},
        )

    def render(self, doc: Doc, style: str) -> str:
        """Ask for a word or phrase; the official style is the question alone."""
        if style == "official":
            return doc.fields["question"]
        return f"{doc.fields['question']}\nAnswer the question using a single word or phrase."

    def parse(self, response: str, doc: Doc, mode: str) -> Parsed:
        """Clean the text as the mode says; blank text names no answer."""
        if mode == "official":
            text = response
        elif mode == "lmms":
            text = _plain(response.strip())
        else:
            text = (response if mode == "llava" else response.strip()).lower().rstrip(".")
        return Parsed(text, "ok" if response.strip() else "unparsed")

    def outcome(self, parsed: Parsed, doc: Doc, mode: str) -> float:
        """Equality with the gold answer."""
        gold = _plain(doc.gold) if mode == "lmms" else doc.gold
        return float(parsed.value == gold)


def _plain(text: str) -> str:
    return text.lower().translate(_NO_PUNCTUATION)


TASK = Gqa
