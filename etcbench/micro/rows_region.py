"""The micro benchmark about regions, read twice: RefCOCO boxes and RefCOCO captions."""

from __future__ import annotations

from datasets import List

from etcbench.micro.questions import expressions
from etcbench.micro.rows import FLOAT, IMAGE, INT8, TEXT, TEXTS, Benchmark, Pictures, Row
from etcbench.micro.scenes import Placed, Scene

PICTURES = 130
CIRCLED = (
    "Please carefully observe the area circled in the image and come up with a caption "
    "for the area."
)


def _describable(scene: Scene) -> list[Placed]:
    """List objects that a phrase picks out and whose box is not a sliver."""
    return [
        placed
        for placed in scene.reading_order
        if expressions(scene, placed)
        and placed.box[2] - placed.box[0] >= 8
        and placed.box[3] - placed.box[1] >= 8
    ]


def refcoco(pictures: Pictures) -> list[Row]:
    """Up to two objects a picture, with every phrase that picks them out."""
    rows: list[Row] = []
    for _ in range(PICTURES):
        shot = pictures.draw(_describable)
        candidates = _describable(shot.scene)
        for order, i in enumerate(shot.rng.permutation(len(candidates))[:2]):
            placed = candidates[i]
            x0, y0, x1, y1 = map(float, placed.box)
            rows.append(
                {
                    "question_id": f"{shot.name}_{order}",
                    "image": shot.image,
                    "question": CIRCLED,
                    "answer": expressions(shot.scene, placed),
                    "segmentation": [x0, y0, x1, y0, x1, y1, x0, y1],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "iscrowd": 0,
                    "file_name": shot.image["path"],
                }
            )
    return rows


REGION = {
    "refcoco": Benchmark(
        {
            "question_id": TEXT,
            "image": IMAGE,
            "question": TEXT,
            "answer": TEXTS,
            "segmentation": List(FLOAT),
            "bbox": List(FLOAT),
            "iscrowd": INT8,
            "file_name": TEXT,
        },
        refcoco,
    ),
}
