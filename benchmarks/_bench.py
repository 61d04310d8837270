"""What the benchmarks share: alternating runs, their spread, the machine, results on disk."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

# glibc gives freed memory back at once and pays for every page anew; with these it keeps it. They
# hold for the whole process, so for every case of a benchmark alike.
ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": str(8 << 30), "MALLOC_MMAP_THRESHOLD_": str(1 << 30)}
RESULTS = Path(__file__).parent / "results"
MICRO = Path(__file__).parent.parent / "etcbench" / "micro" / "models" / "micro-llava"


def arguments(description: str | None, rounds: int = 5, **numbers: int) -> argparse.Namespace:
    """Read ``--json``, ``--save``, ``--threads``, ``--rounds`` and further numbers."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print the result as json")
    parser.add_argument("--save", action="store_true", help="write it to benchmarks/results/")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=rounds)
    for name, default in numbers.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    chosen = parser.parse_args()
    if not set(ALLOCATOR) <= set(os.environ):
        # the C library reads them when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})
    torch.set_num_threads(chosen.threads)
    return chosen


def report(name: str, result: dict[str, Any], chosen: argparse.Namespace) -> None:
    """Print a result, as json or as lines; keep it if asked to."""
    result = {"benchmark": name, **result, "machine": machine()}
    if chosen.save:
        keep(RESULTS / f"{name}.json", result)
    if chosen.json:
        print(json.dumps(result, indent=1))
        return
    for key, value in result.items():
        shown = [value] if not isinstance(value, list) else value
        for entry in shown:
            print(f"{key}: {json.dumps(entry)}")


def keep(file: Path, result: dict[str, Any]) -> None:
    """Write a result as json."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """Say what the figures were measured on; the load tells how much else was running."""
    return {
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "allocator": "keeps freed memory",
        "architecture": platform.machine(),
        "load": round(os.getloadavg()[0], 1),
        **{package: version(package) for package in ("torch", "transformers")},
    }


def alternate(
    cases: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1, settle: bool = False
) -> dict[str, dict[str, list[float]]]:
    """Run cases in turn, so that what disturbs the machine disturbs all of them.

    Parameters
    ----------
    cases : mapping of str to callable
        What is timed.
    rounds, warmup : int
        Rounds that count, and rounds before them.
    settle : bool
        Run each case once untimed right before it is timed: a short case behind long ones of other
        code otherwise pays for memory and caches that those have turned over.

    Returns
    -------
    dict
        By case: ``wall`` and ``cpu`` seconds of each round. Processor time counts what this
        process itself has used, whatever else runs.
    """
    times: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in cases}
    for number in range(warmup + rounds):
        for name, case in cases.items():
            if settle and number >= warmup:
                case()
            cpu, wall = time.process_time(), time.perf_counter()
            case()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if number >= warmup:
                times[name]["wall"].append(wall)
                times[name]["cpu"].append(cpu)
    return times


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Median, extremes and number."""
    figures = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {**{k: float(f"{v:.{digits}g}") for k, v in figures.items()}, "n": len(values)}


def ratio(slow: dict[str, list[float]], fast: dict[str, list[float]]) -> dict[str, Any]:
    """How many times faster the second case is, by wall clock and by processor time.

    The ratios are taken within each round, whose runs follow each other directly.
    """
    return {
        clock: spread([a / b for a, b in zip(slow[clock], fast[clock], strict=True)])
        for clock in ("wall", "cpu")
    }


def matmul_rate(dtype: torch.dtype = torch.float32, size: int = 1024) -> float:
    """Measure the best rate of square matrix products, FLOP/s of processor time per thread."""
    a, b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    best = 0.0
    for _ in range(10):
        start = time.process_time()
        a @ b
        best = max(best, 2 * size**3 / (time.process_time() - start))
    return best


def random_llava(folder: Path, **shape: int) -> Path:
    """Write a random LLaVA with a real processor: ``side``, ``patch``, ``layers``, widths."""
    sys.path.append(str(Path(__file__).parent.parent / "tests"))
    from tiny import save_tiny_llava

    return save_tiny_llava(folder, **shape)
