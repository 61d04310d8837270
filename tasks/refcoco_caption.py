"""RefCOCO region captions: describe what a drawn box encloses (spec tasks 4.7.2).

One row: a photo with a red outline around a giraffe, gold ``the giraffe on the left`` and ``left
giraffe``; the model reads ``Provide a short description for this region.``
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from etcbench.doc import Picture, Row
from etcbench.scoring.captions import cider_of, other_metrics, tokenise
from etcbench.scoring.statistics import Floats, ratio
from etcbench.task import Doc, HubSource, Parsed, Scored, Task

ASK = "Provide a short description for this region."


class RefCocoCaption(Task):
    """RefCOCO captions: CIDEr x 100 over the whole split, the "bbox" column of the ETC paper.

    The value depends on the evaluated set: a subset is not comparable with the split.

    Parameters
    ----------
    split : str
        ``"testA"``, ``"testB"`` or ``"val"``.
    """

    name = "refcoco_caption"
    stem = "refcoco"
    columns = ("question_id", "image", "answer", "bbox")
    styles = ("llava", "lmms", "official")
    modes: ClassVar = ("official",)
    variants: ClassVar = {name: {"split": name} for name in ("testA", "testB", "val")}
    unit = "raw"
    hit_rate = False
    metric = "cider_x100"
    max_new_tokens = 64

    def __init__(self, split: str = "testA") -> None:
        self.source = HubSource(("lmms-lab-encoder/RefCOCO", "lmms-lab/RefCOCO"), split=split)
        self.name = "refcoco_caption" if split == "testA" else f"refcoco_caption_{split}"

    def doc(self, row: Row, index: int) -> Doc:
        """Draw the box; group by picture; gold is every expression."""
        x, y, w, h = (float(v) for v in row["bbox"])
        key = str(row["question_id"])
        return Doc(
            id=key,
            group=str(row.get("file_name") or key),
            pictures=tuple(
                Picture(picture.data, box=(x, y, x + w, y + h), path=picture.path)
                for picture in self.pictures(row)
            ),
            fields={"question": row.get("question"), "question_id": key},
            gold=tuple(row["answer"]),
        )

    def from_official(self, record: Row, path: Path) -> Row:
        """Rename the fields of a list of refs: ref_id, sentences, corners."""
        if "sentences" not in record:
            return record
        x0, y0, x1, y1 = record["bbox_xyxy"]
        return {
            "question_id": record["ref_id"],
            "answer": record["sentences"],
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "file_name": record.get("image_id"),
        }

    def render(self, doc: Doc, style: str) -> str:
        """Ask for a description; the official style is the data set's own sentence."""
        return doc.fields["question"] if style == "official" else ASK

    def parse(self, response: str, doc: Doc, mode: str) -> Parsed:
        """Take the whole text."""
        return Parsed(response, "ok" if response.strip() else "unparsed")

    def outcome(self, parsed: Parsed, doc: Doc, mode: str) -> float:
        """Word-for-word agreement with one of the expressions, a rough per-sample mark."""
        return float(tokenise(parsed.value) in [tokenise(text) for text in doc.gold])

    def headline(self, rows: Sequence[Scored], mode: str) -> dict[str, float]:
        """CIDEr x 100, then every metric in its own scale."""
        samples, _ = cider_of(*_texts(rows))
        score = math.fsum(samples) / len(rows)
        return {self.metric: 100 * score, "CIDEr": score, **other_metrics(*_texts(rows))[0]}

    def notes(self, rows: Sequence[Scored], mode: str) -> tuple[str, ...]:
        """Say how the text was tokenised and what is missing."""
        remarks = (cider_of(*_texts(rows))[1], other_metrics(*_texts(rows))[1])
        return tuple(remark for remark in remarks if remark)

    def table(self, rows: Sequence[Scored], mode: str) -> Floats:
        """CIDEr of each sample; the document frequencies stay those of the whole set."""
        return np.stack([cider_of(*_texts(rows))[0], np.ones(len(rows))], 1)

    def statistic(self, sums: Floats) -> Floats:
        """Mean CIDEr x 100."""
        return 100 * ratio(sums[:, 0], sums[:, 1])


def _texts(rows: Sequence[Scored]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    return tuple(row.response or "" for row in rows), tuple(row.doc.gold for row in rows)


TASK = RefCocoCaption
