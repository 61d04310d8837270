"""Which places of the pictures methods keep, for the samples that a report shows.

Needs the models; the result is a small file from which reports are drawn again without them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from etcbench.backbones import Backbone, load_backbone
from etcbench.console import progress
from etcbench.doc import Doc
from etcbench.errors import BudgetError, MissingCheckpointError, UsageError
from etcbench.html_report import SAMPLES, Places, sampled
from etcbench.inspection import inspect
from etcbench.measured import label_of
from etcbench.run import LoadedMethod
from etcbench.sweep import Sweep
from etcbench.task import Task


def find_places(sweeps: Iterable[Sweep], samples: int = SAMPLES) -> dict[str, Any]:
    """Follow the pictures of a report's samples through every method of some sweeps.

    Parameters
    ----------
    sweeps : iterable of Sweep
        What the report compares; cells that cannot run are left out, as are controls.
    samples : int
        Samples of each benchmark.

    Returns
    -------
    dict
        Model to method (with its options and budget) to benchmark to sample to ``[stage, rows,
        columns, kept places, merged places]`` of the last stage.
    """
    found: dict[str, Any] = {}
    models: dict[str, Backbone] = {}
    opened: dict[str, tuple[Task, list[Doc]]] = {}
    for sweep in sweeps:
        if sweep.shuffle_pictures or sweep.model is None:
            continue
        if sweep.model not in models:
            models[sweep.model] = load_backbone(sweep.model)
        backbone = models[sweep.model]
        chosen = []
        for name in sweep.tasks:
            # The sweeps of a plan ask the same benchmarks over and over.
            key = f"{name} {sweep.data} {sweep.split} {sweep.limit}"
            if key not in opened:
                task = sweep.open(name)
                opened[key] = (task.task, sampled(task.docs, samples))
            chosen.append(opened[key])
        for name, budget in sweep.variants():
            try:
                method = sweep.build(name, budget, backbone)
            except (BudgetError, MissingCheckpointError):
                continue
            built = method.compressor
            if built.resamples or built.learned_tokens() is not None:
                continue  # its tokens stand for the whole picture and for no place in it
            placed = _placed(backbone, method, chosen)
            if placed:
                config = {
                    "method": built.name(),
                    "options": method.options,
                    "weights": method.weights,
                    "model": {"name": sweep.model},
                }
                label = " ".join(filter(None, (label_of(config), str(built.budget or ""))))
                found.setdefault(sweep.model, {})[label] = placed
    return found


def _placed(
    backbone: Backbone, method: LoadedMethod, chosen: Sequence[tuple[Task, list[Doc]]]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with progress(f"places {method.compressor.name()}", len(chosen)) as advance:
        for task, docs in chosen:
            for doc in docs:
                if not doc.pictures or not method.compressor.uses_image:
                    continue
                try:
                    (seen,) = inspect(backbone, [method], doc.pictures[0], task.prompt(doc))
                except UsageError:  # an unreadable picture has no places
                    continue
                stages = [stage for stage in seen.stages if stage.kept or stage.merged]
                if stages and len(stages[-1].kept) < stages[-1].places:
                    last = stages[-1]
                    entry = [last.label, *last.grid, list(last.kept), sorted(last.merged)]
                    found.setdefault(task.name, {})[doc.id] = entry
            advance(1)
    return found


def read_places(file: Path) -> Places:
    """Read what `find_places` found, if the file exists.

    Raises
    ------
    UsageError
        If the file is damaged.
    """
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text()))
    except ValueError as error:
        raise UsageError(f"{file} is not a file of places: {error}") from error
