"""Opening pictures ahead: threads against a torch ``DataLoader`` with processes.

640x480 JPEG files are decoded, padded, resized to 336 and normalised in batches of 16, while the
main thread does what stands for a model: matrix products that take about as long.

Run ``python benchmarks/pictures.py``.
"""

from __future__ import annotations

import io
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _bench import alternate, arguments, random_llava, report, spread
from PIL import Image
from torch.utils.data import DataLoader

from etcbench.backbones import load_backbone
from etcbench.doc import Picture
from etcbench.pictures import PictureThreads, open_pictures

BATCH = 16


def jpeg(number: int) -> Picture:
    """Draw smooth noise, which compresses about as a photograph does."""
    generator = torch.Generator().manual_seed(number)
    coarse = torch.randint(0, 256, (30, 40, 3), generator=generator, dtype=torch.uint8)
    stream = io.BytesIO()
    Image.fromarray(coarse.numpy()).resize((640, 480), Image.Resampling.BICUBIC).save(
        stream, "JPEG", quality=90
    )
    return Picture(stream.getvalue())


def main() -> int:
    chosen = arguments(__doc__, batches=8)
    with tempfile.TemporaryDirectory() as folder:
        path = random_llava(Path(folder) / "model", side=336, patch=14)
        model: Any = load_backbone(str(path), device="cpu")
        batches = [
            {str(n): jpeg(n) for n in range(start * BATCH, (start + 1) * BATCH)}
            for start in range(chosen.batches)
        ]
        start = time.perf_counter()
        open_pictures(model, batches[0])
        opening = time.perf_counter() - start
        left = torch.randn(512, 512)

        def compute() -> None:
            until = time.process_time() + opening
            while time.process_time() < until:
                left @ left

        def threads(workers: int) -> Callable[[], None]:
            def run() -> None:
                with PictureThreads(model, workers) as pool:
                    waiting: deque[Any] = deque()
                    for batch in batches:
                        waiting.append(pool.ahead(batch))
                        if len(waiting) > workers:
                            waiting.popleft()()
                            compute()
                    while waiting:
                        waiting.popleft()()
                        compute()

            return run

        def processes(workers: int) -> Callable[[], None]:
            loader: Any = DataLoader(
                batches,  # type: ignore[arg-type]
                batch_size=None,
                num_workers=workers,
                prefetch_factor=1,
                collate_fn=lambda batch: open_pictures(model, batch),
            )

            def run() -> None:
                for _ in loader:
                    compute()

            return run

        cases = {f"threads {n}": threads(n) for n in (0, 1, 2, 4)}
        cases |= {f"processes {n}": processes(n) for n in (1, 2)}
        times = alternate(cases, chosen.rounds)
    pictures = BATCH * chosen.batches
    result = {
        "pictures_per_second": {
            name: spread([pictures / seconds for seconds in clocks["wall"]])
            for name, clocks in times.items()
        },
        "opening_ms_per_picture": round(1e3 * opening / BATCH, 2),
    }
    report("pictures", result, chosen)
    return 0


if __name__ == "__main__":
    sys.exit(main())
