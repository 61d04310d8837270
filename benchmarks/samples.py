"""A run over 100,000 samples on a random tiny model: memory over time, and the store's share.

The run is an ordinary one, ``evaluate`` into a directory, on rows in a parquet file with five
questions per picture. Resident memory is read at every tenth of the way; the store's time is what
is spent in writing batches of records, the wait for the disk included.

Run ``python benchmarks/samples.py``; it exits with 1 when memory grows by over 5 % between the
second tenth and the end of the answers, or the store takes over 2 % of the time.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from _bench import arguments, random_llava, report
from PIL import Image

from etcbench.backbones import load_backbone
from etcbench.engine import Settings
from etcbench.loading import load_task
from etcbench.run import evaluate, load_compressor
from etcbench.store import RunDirectory

PER_PICTURE = 5
MEMORY_LIMIT, STORE_LIMIT = 0.05, 0.02
CACHE_MIB = 16


def png(number: int) -> bytes:
    """Draw a picture that no other number gives."""
    pixels = torch.zeros(24, 24, 3, dtype=torch.uint8)
    pixels[:2, :4, 0] = torch.tensor(list(number.to_bytes(8, "big"))).view(2, 4)
    stream = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(stream, "PNG")
    return stream.getvalue()


def write_rows(path: Path, samples: int) -> None:
    """Write POPE rows; a file of row groups, so that it is read in parts."""
    rows = [
        {
            "id": str(number),
            "question_id": str(number),
            "question": f"Is there a thing {number % PER_PICTURE}?",
            "answer": "yes" if number % 2 else "no",
            "image_source": str(number // PER_PICTURE),
            "image": {"bytes": png(number // PER_PICTURE), "path": None},
            "category": ("random", "popular", "adversarial")[number % 3],
        }
        for number in range(samples)
    ]
    pd.DataFrame(rows).to_parquet(path, row_group_size=1000)


def resident() -> int:
    """Bytes of memory that this process holds now (Linux)."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def main() -> int:
    chosen = arguments(__doc__, rounds=1, samples=100_000, batch=128)
    memory: list[int] = []
    stored = {"seconds": 0.0, "processor": 0.0, "answers": 0, "next": 0}
    append = RunDirectory.append

    def watched(run: RunDirectory, records: Any) -> None:
        batch = list(records)
        wall, cpu = time.perf_counter(), time.process_time()
        append(run, batch)
        stored["seconds"] += time.perf_counter() - wall
        stored["processor"] += time.process_time() - cpu
        stored["answers"] += len(batch)
        while stored["answers"] >= stored["next"]:
            memory.append(resident())
            stored["next"] += chosen.samples / 10

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "pope.parquet", chosen.samples)
        model = load_backbone(str(random_llava(folder / "model", side=24, layers=2)), device="cpu")
        method = load_compressor("full", None, model)
        task = load_task("pope", folder)
        RunDirectory.append = watched  # type: ignore[method-assign,assignment]
        wall, cpu = time.perf_counter(), time.process_time()
        settings = Settings(chosen.batch, max_new_tokens=2, cache_mib=CACHE_MIB)
        run = evaluate(model, method, task, settings=settings, out=folder / "runs")
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        assert run.summary is not None and run.summary["n"] == chosen.samples
    growth = max(memory[2:]) / memory[2] - 1
    result = {
        "samples": chosen.samples,
        "resident_mib_by_tenth": [size >> 20 for size in memory],
        "memory_growth": round(growth, 4),
        "store_share": round(stored["processor"] / cpu, 4),
        "store_share_wall": round(stored["seconds"] / wall, 4),
        "seconds": round(wall, 1),
        "processor_seconds": round(cpu, 1),
        "answers_per_second": round(chosen.samples / wall, 1),
    }
    report("samples", result, chosen)
    return int(growth > MEMORY_LIMIT or result["store_share_wall"] > STORE_LIMIT)


if __name__ == "__main__":
    sys.exit(main())
