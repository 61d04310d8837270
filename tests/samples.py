"""Small data directories in the columns of the hub data sets."""

from __future__ import annotations

import io
from collections.abc import Collection
from pathlib import Path
from typing import Any

import datasets
from tiny import picture


def encoded(seed: int) -> bytes:
    """A random picture as PNG."""
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def mme_rows(pictures: int, broken: Collection[int] = ()) -> list[dict[str, Any]]:
    """Two questions for each picture; those numbered in ``broken`` do not decode."""
    return [
        {
            "question_id": f"{number}.png",
            "image": {"bytes": b"no picture" if number in broken else encoded(number), "path": ""},
            "question": f"Is there a {thing} in this image? Please answer yes or no.",
            "answer": answer,
            "category": ("existence", "count")[number % 2],
        }
        for number in range(pictures)
        for thing, answer in (("train", "Yes"), ("dog", "No"))
    ]


def pope_rows(pictures: int) -> list[dict[str, Any]]:
    """One question for each picture."""
    return [
        {
            "id": str(number),
            "question_id": str(number),
            "question": "Is there a snowboard in the image?",
            "answer": ("yes", "no")[number % 2],
            "image_source": f"picture_{number}",
            "image": {"bytes": encoded(number), "path": ""},
            "category": ("adversarial", "popular", "random")[number % 3],
        }
        for number in range(pictures)
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as a parquet file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    return path
