"""What ETC's auxiliary loss costs in training: step time and peak memory against plain CE.

Run ``python benchmarks/vid_cost.py``. Time: both models take the same optimiser steps in turn, so
that whatever else the machine does falls on both. Memory: a few steps in processes of their own.
It exits with 1 when the loss costs 15 % of a step or more.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _bench import keep

VARIANTS = {"ce": ["options.lambda_vid=0"], "vid": []}
CLOCKS = ("seconds", "processor_seconds")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def now() -> dict[str, float]:
    """Read the clocks once the device has finished its work."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return {"seconds": time.perf_counter(), "processor_seconds": time.process_time()}


def stepper(recipe: str, settings: list[str], variant: str) -> Callable[[int], dict[str, float]]:
    """Build a model, and return what takes and times its step number ``i``."""
    from etcbench.packing import Packer
    from etcbench.recipes import load_recipe
    from etcbench.recipes.run import start
    from etcbench.recipes.sources import open_source
    from etcbench.training import choose_trainable

    chosen = load_recipe(recipe, [*settings, *VARIANTS[variant]])
    stage = chosen.stages[-1]
    model = start(chosen, Path()).train().to(DEVICE)
    choose_trainable(model, stage, tokens_too=False)
    packer, source = Packer(model.backbone, model.method.prompt_layout), open_source(chosen, stage)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=stage.learning_rate)

    def step(number: int) -> dict[str, float]:
        first = number * stage.batch_size
        batch = packer([source.sample(first + i) for i in range(stage.batch_size)])["batch"]
        begin = now()
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(batch)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return {clock: value - begin[clock] for clock, value in now().items()}

    return step


def spread(values: list[float]) -> list[float]:
    """Median, lower and upper quartile."""
    return torch.tensor(values).quantile(torch.tensor([0.5, 0.25, 0.75])).tolist()


def measure(recipe: str, settings: list[str], steps: int, rounds: int) -> dict[str, Any]:
    """Measure both, and compare them step by step."""
    from etcbench.environment import checkout, device_name, package_versions

    # First, while this process is small: a child's peak begins with its parent's memory.
    peaks: dict[str, list[int]] = {variant: [] for variant in VARIANTS}
    child = [sys.executable, __file__, "--recipe", recipe, *(f"--set={s}" for s in settings)]
    for _ in range(rounds):
        for variant in VARIANTS:
            printed = subprocess.check_output([*child, "--peak", variant], text=True)
            peaks[variant].append(int(printed.split()[-1]))
    models = {variant: stepper(recipe, settings, variant) for variant in VARIANTS}
    timed: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    for number in range(-2, steps):  # the first two do not count
        for variant in sorted(models, reverse=bool(number % 2)):
            taken = models[variant](number + 2)
            timed[variant] += [taken] if number >= 0 else []
    pairs = list(zip(timed["ce"], timed["vid"], strict=True))
    return {
        "recipe": recipe,
        "settings": settings,
        "steps": steps,
        "step": {v: {c: spread([t[c] for t in timed[v]]) for c in CLOCKS} for v in VARIANTS},
        "added_share_of_a_step": {c: spread([v[c] / p[c] - 1 for p, v in pairs]) for c in CLOCKS},
        "peak_bytes": peaks,
        "added_share_of_peak": median(peaks["vid"]) / median(peaks["ce"]) - 1,
        "device": device_name(DEVICE),
        "threads": torch.get_num_threads(),
        "packages": package_versions(("torch", "transformers")),
        "checkout": checkout(),
    }


def table(found: dict[str, Any]) -> str:
    """Write the figures as markdown; added time is the median of the ratios of paired steps."""
    lines = [
        f"# Cost of the VID term: {' '.join([found['recipe'], *found['settings']])}\n",
        f"{found['device']}, {found['threads']} threads, {found['steps']} steps of each in turn.\n",
        "| median [quartiles] | s per step | processor s | peak memory, MiB |",
        "|:--|--:|--:|--:|",
    ]
    seconds, share = "{:.2f} [{:.2f}, {:.2f}]".format, "{:+.1%} [{:+.1%}, {:+.1%}]".format
    for variant, name in (("ce", "CE"), ("vid", "CE + lambda VID")):
        cells = [seconds(*kind) for kind in found["step"][variant].values()]
        peak = median(found["peak_bytes"][variant]) / 2**20
        lines.append(f"| {name} | {' | '.join(cells)} | {peak:.0f} |")
    cells = [share(*kind) for kind in found["added_share_of_a_step"].values()]
    lines.append(f"| added | {' | '.join(cells)} | {found['added_share_of_peak']:+.1%} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="micro-etc-1")
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3, help="processes per variant, for memory")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md too")
    parser.add_argument("--peak", choices=VARIANTS, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.peak:
        step = stepper(chosen.recipe, chosen.settings, chosen.peak)
        for number in range(4):
            step(number)
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(torch.cuda.max_memory_allocated() if DEVICE == "cuda" else resident)
        return 0
    found = measure(chosen.recipe, chosen.settings, chosen.steps, chosen.rounds)
    print(table(found))
    if chosen.out is not None:
        keep(chosen.out.with_suffix(".json"), found)
        chosen.out.with_suffix(".md").write_text(table(found))
    return int(found["added_share_of_a_step"]["processor_seconds"][0] >= 0.15)


if __name__ == "__main__":
    sys.exit(main())
