"""RefCOCO localisation: one expression, one box (spec tasks 4.7.1).

One row: ``the giraffe on the left``, gold box [41.83, 281.18, 104.18, 43.53] (x, y, w, h in
pixels); LLaVA reads ``Please provide the bounding box coordinate of the region this sentence
describes: the giraffe on the left`` and answers in fractions such as ``[0.12, 0.34, 0.56, 0.78]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from etcbench.doc import Row
from etcbench.errors import UsageError
from etcbench.scoring.boxes import (
    CONVENTIONS,
    centre_inside,
    guess_convention,
    iou,
    read_box_lmms,
    read_boxes,
    tidy,
    to_pixels,
)
from etcbench.task import UNPARSED, Doc, HubSource, Parsed, Scored, Task, percent

THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)
_ASK = "lease provide the bounding box coordinate of the region this sentence describes: "
PROMPTS = {
    "llava": f"P{_ASK}{{}}",
    "qwen3_vl": (
        'Locate every object that matches the description "{}" in the image. '
        "Report bbox coordinates in JSON format."
    ),
    "lmms": (
        "Bounding box coordinates are specified in the format (top-left x, top-left y, "
        "bottom-right x, bottom-right y). All values are floating point numbers bounded between "
        f"0 and 1. P{_ASK}{{}}"
    ),
}


class RefCocoRec(Task):
    """RefCOCO boxes; the mode is the model's coordinate convention, which is never guessed.

    ``unit``, ``unit_padded`` (LLaVA-1.5), ``milli`` (Qwen3-VL) and ``pixel`` as in
    `etcbench.scoring.boxes.to_pixels`; ``guess`` goes by the size of the numbers; ``lmms`` is
    lmms-eval's stricter pattern on fractions.

    Parameters
    ----------
    split : str
        ``"testA"``, ``"testB"`` or ``"val"``; the hub's val is not the official one.
    """

    name = "refcoco_rec"
    stem = "refcoco"
    columns = ("question_id", "image", "answer", "bbox")
    explode = "answer"
    styles = tuple(PROMPTS)
    modes: ClassVar = (*CONVENTIONS, "guess", "lmms")
    variants: ClassVar = {name: {"split": name} for name in ("testA", "testB", "val")}
    metric = "acc@0.5"
    scores_by_size = True

    def __init__(self, split: str = "testA") -> None:
        self.source = HubSource(("lmms-lab-encoder/RefCOCO", "lmms-lab/RefCOCO"), split=split)
        self.name = "refcoco_rec" if split == "testA" else f"refcoco_rec_{split}"

    def doc(self, row: Row, index: int) -> Doc:
        """Make one sample of one expression; group by picture."""
        x, y, w, h = (float(v) for v in row["bbox"])
        pictures = self.pictures(row)
        key = str(row["question_id"])
        return Doc(
            id=f"{key}.{row.get('entry_index', 0)}",
            group=str(row.get("file_name") or key),
            pictures=pictures,
            fields={
                "expression": row["answer"],
                "question_id": key,
                "size": pictures[0].size if pictures else row.get("size"),
            },
            gold=(x, y, x + w, y + h),
        )

    def render(self, doc: Doc, style: str) -> str:
        """Put the expression into the style's sentence."""
        return PROMPTS[style].format(doc.fields["expression"])

    def parse(self, response: str, doc: Doc, mode: str) -> Parsed:
        """Take the first box, in pixels, and count how many were listed."""
        if doc.fields["size"] is None:
            raise UsageError(f"{self.name}: sample {doc.id} has no readable picture to scale by")
        width, height = doc.fields["size"]
        if mode == "lmms":
            strict = read_box_lmms(response)
            if strict is None:
                return UNPARSED
            return _found(to_pixels(strict, "unit", width, height), 1)
        boxes = read_boxes(response)
        if not boxes:
            return UNPARSED
        convention = guess_convention(boxes[0]) if mode == "guess" else mode
        pixels = to_pixels(boxes[0], convention, width, height)  # type: ignore[arg-type]
        return _found(tidy(pixels, width, height), len(boxes))

    def outcome(self, parsed: Parsed, doc: Doc, mode: str) -> float:
        """IoU of at least 0.5."""
        return float(_iou(parsed, doc) >= 0.5)

    def headline(self, rows: Sequence[Scored], mode: str) -> dict[str, float]:
        """Acc@0.5, then mean IoU, the other thresholds and the centre accuracy, in percent."""
        n = len(rows)
        overlaps = sorted(_iou(row.parsed, row.doc) for row in rows)
        found = {self.metric: percent(rows), "mean_iou": 100 * sum(overlaps) / n}
        for threshold in THRESHOLDS:
            found[f"acc@{threshold}"] = 100 * sum(o >= threshold for o in overlaps) / n
        centres = sum(
            row.parsed.value is not None and centre_inside(row.parsed.value["box"], row.doc.gold)
            for row in rows
        )
        return {**found, "centre_acc": 100 * centres / n}


def _found(box: Sequence[float], count: int) -> Parsed:
    return Parsed({"box": list(box), "count": count})


def _iou(parsed: Parsed, doc: Doc) -> float:
    value: dict[str, Any] | None = parsed.value
    return 0.0 if value is None else iou(tuple(value["box"]), doc.gold)


TASK = RefCocoRec
