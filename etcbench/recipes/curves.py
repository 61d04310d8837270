"""Collect the logs of a training run, and draw its loss curves.

    python -m etcbench.recipes.curves runs/training/micro-llava results/measured/micro/training

copies ``recipe.json`` and each stage's ``log.jsonl`` into ``TARGET/<name>/`` and draws
``curves.png`` there; the name is the recipe's, or that of ``--name`` (a seed, an ablation).
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from etcbench.errors import UsageError

PARTS = {"ce": "cross-entropy", "auxiliary": "weighted auxiliary loss", "naming": "naming loss",
         "kl": "KL divergence from the relevance"}  # fmt: skip


def collect(run: Path, target: Path, name: str | None = None) -> Path:
    """Copy what documents a run, and draw its curves.

    Parameters
    ----------
    run : Path
        Output folder of `etcbench.recipes.train`.
    target : Path
        Receives a folder.
    name : str, optional
        Its name; default that of the recipe.

    Returns
    -------
    Path
        That folder.

    Raises
    ------
    UsageError
        If ``run`` is not the output of a training.
    """
    if not (run / "recipe.json").is_file():
        raise UsageError(f"{run} is no training run: it has no recipe.json")
    recipe = json.loads((run / "recipe.json").read_text())
    folder = target / (name or str(recipe["name"]))
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(run / "recipe.json", folder)
    logs = {}
    for log in sorted(run.glob("*/log.jsonl")):
        stage = log.parent.name
        shutil.copy(log, folder / f"{stage}.jsonl")
        logs[stage] = [json.loads(line) for line in log.read_text().splitlines()]
    draw({stage: log for stage, log in logs.items() if stage.startswith("stage")}, folder)
    return folder


def draw(stages: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """Draw the parts of the loss over all steps, with a line where a stage begins."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    styles = dict(zip(PARTS, ("-", "--", ":", "-."), strict=True))
    begin = 0
    series: dict[str, tuple[list[int], list[float]]] = {part: ([], []) for part in PARTS}
    for records in stages.values():
        if begin:
            axes.axvline(begin, color="0.7", linewidth=0.8)
        for record in records:
            for part in PARTS:
                if part in record:
                    series[part][0].append(begin + record["step"])
                    series[part][1].append(record[part])
        begin += max((record["step"] for record in records), default=0)
    for part, (steps, values) in series.items():
        if steps:
            axes.plot(steps, values, styles[part], color="black", label=PARTS[part])
    axes.set(xlabel="step", ylabel="loss", yscale="log", title=f"{folder.name} (micro)")
    axes.legend(frameon=False)
    figure.savefig(folder / "curves.png", dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="output folder of a training")
    parser.add_argument("target", type=Path, help="folder of the collected trainings")
    parser.add_argument("--name", help="folder in it; default the recipe's name")
    given = parser.parse_args()
    try:
        print(collect(given.run, given.target, given.name))
    except UsageError as error:
        parser.error(str(error))
