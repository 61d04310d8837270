"""Peak memory of an answer.

On a GPU torch counts what it hands out. On the CPU nobody does, so a fresh process, in which the
allocator returns freed blocks to the system at once, answers each question twice and reports how
far the second time its resident memory rises above what it was before (Linux).
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from etcbench.backbones import Backbone
from etcbench.compressor import Compressor
from etcbench.efficiency.requests import Trial, Workload

STATUS, PEAK_RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# Blocks above 64 KiB are mapped on their own and unmapped when freed; one arena for the rest.
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
}


@dataclass(frozen=True)
class Peak:
    """Bytes above what is resident between answers (weights and libraries).

    Attributes
    ----------
    growth : int
        How far memory rises during an answer.
    resident : int
        What is there before.
    source : str
        How it was measured.
    """

    growth: int
    resident: int
    source: str


@torch.inference_mode()
def peak_on_gpu(backbone: Backbone, method: Compressor, workload: Workload) -> Peak:
    """Read torch's counters around a second answer."""
    trial, device = Trial(backbone, method, workload), backbone.device
    _answer(trial)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    _answer(trial)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    return Peak(peak - before, before, "torch.cuda.max_memory_allocated")


def peaks_on_cpu(
    model: str,
    methods: Mapping[str, tuple[str, str | None, Mapping[str, Any]]],
    workload: Workload,
    dtype: str,
    attention: str,
    threads: int,
) -> dict[str, Peak] | None:
    """Measure methods in a fresh process.

    Parameters
    ----------
    model : str
        What `load_backbone` takes.
    methods : mapping
        By label: name, budget as written, and options.
    workload : Workload
        What is asked.
    dtype, attention : str
        As the model is to be loaded.
    threads : int
        Of torch.

    Returns
    -------
    dict or None
        By label; None where the system does not tell.
    """
    if not os.access(PEAK_RESET, os.W_OK):
        return None
    job = {
        "model": model,
        "methods": methods,
        "workload": vars(workload),
        "dtype": dtype,
        "attention": attention,
        "threads": threads,
    }
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env={**os.environ, **ALLOCATOR},
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise RuntimeError(f"the process that measures memory ended with: {last[0]}")
    peaks = json.loads(done.stdout.splitlines()[-1])
    return {label: Peak(*values) for label, values in peaks.items()}


def _answer(trial: Trial) -> None:
    trial.generate(*trial.prefill(trial.prefix()))


def _resident(field: str) -> int:
    """Bytes of a field of the process's status: resident now, or its peak."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


@torch.inference_mode()
def _measure(job: Mapping[str, Any]) -> dict[str, Sequence[Any]]:
    from etcbench.backbones import load_backbone
    from etcbench.efficiency.methods import build

    torch.set_num_threads(job["threads"])
    asked = job["workload"]
    workload = Workload(
        **{**asked, "picture": tuple(asked["picture"]), "text": tuple(asked["text"])}
    )
    backbone = load_backbone(
        job["model"], device="cpu", dtype=job["dtype"], attention=job["attention"]
    )
    system = ctypes.CDLL(None)
    found: dict[str, Sequence[Any]] = {}
    for label, (name, budget, options) in job["methods"].items():
        trial = Trial(backbone, build(name, budget, backbone, options).compressor, workload)
        _answer(trial)
        if hasattr(system, "malloc_trim"):
            system.malloc_trim(0)
        before = _resident("VmRSS:")
        PEAK_RESET.write_text("5")
        _answer(trial)
        growth = _resident("VmHWM:") - before
        found[label] = (growth, before, "resident memory of a fresh process")
    return found


if __name__ == "__main__":
    print(json.dumps(_measure(json.load(sys.stdin))))
