"""Runs against runs on the same samples: differences to a baseline, and the hard samples.

Both read answers that are on disk and the questions they belong to; no model is needed. Two runs
pair only if everything about the model and the benchmark is the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from etcbench.controls import SHUFFLED
from etcbench.doc import Doc
from etcbench.errors import UsageError
from etcbench.loading import load_task
from etcbench.store import RunDirectory
from etcbench.task import Task, compare_runs

# What two runs must share to be paired.
SAME = ("model", "preprocessing", "dtype", "task", "task_options", "data", "style", "mode")
CONTROL = "downsample"


@dataclass(frozen=True)
class Difference:
    """Score minus the baseline's, on the same samples.

    Attributes
    ----------
    baseline : str
        Name of the baseline row.
    value, low, high : float
        Difference of the headline, and its 95 % interval (paired bootstrap by group).
    n : int
        Samples.
    """

    baseline: str
    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Hard:
    """Score on the samples that the picture at low resolution does not answer.

    Attributes
    ----------
    value : float
        Mean correctness in percent.
    n : int
        Samples that the `CONTROL` with the same budget gets wrong.
    """

    value: float
    n: int


@dataclass
class Pairing:
    """Runs with what is needed to compare them sample by sample.

    Parameters
    ----------
    runs : sequence of RunDirectory
        Finished ones; others are left out.
    """

    runs: Sequence[RunDirectory]
    _tasks: dict[str, tuple[Task, list[Doc]]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.runs = [run for run in self.runs if run.finished]

    def differences(self, baseline: str) -> dict[Path, Difference]:
        """Compare every run with the baseline's on the same benchmark.

        Parameters
        ----------
        baseline : str
            ``full``, a method and its budget as ``voco-1``, or the folder of a checkpoint; the
            first of several.

        Returns
        -------
        dict of Path to Difference
            By run; the baseline itself and runs without a counterpart are left out.

        Raises
        ------
        UsageError
            If no run is of that name.
        """
        found = {_cell_key(run): run for run in reversed(self.runs) if baseline in _names(run)}
        if not found:
            known = ", ".join(sorted({name_of(run) for run in self.runs}))
            raise UsageError(f"--baseline {baseline}: there is no such run; there is {known}")
        differences = {}
        for run in self.runs:
            other = found.get(_cell_key(run))
            if other is None or other is run:
                continue
            task, docs = self._questions(run)
            mode = run.manifest["config"]["mode"]
            paired = compare_runs(task, _pairs(docs, other), _pairs(docs, run), mode)
            low, high = paired.interval.low, paired.interval.high
            differences[run.path] = Difference(baseline, paired.difference, low, high, paired.n)
        return differences

    def hard(self) -> dict[Path, Hard]:
        """Score every run on the samples that the control of the same budget gets wrong.

        A picture reduced to as many tokens is the least that any method with that budget could
        see; what it answers needs no compression method. Where several budgets would do, the
        control of the run's own budget counts, else of the smallest.
        """
        controls: dict[str, dict[int, set[str]]] = {}
        for run in self.runs:
            if run.manifest["config"]["method"] == CONTROL:
                wrong = {key for key, record in run.records.items() if record["correct"] < 0.5}
                controls.setdefault(_cell_key(run), {})[run.tokens] = wrong
        found = {}
        for run in self.runs:
            by_budget = controls.get(_cell_key(run))
            if not by_budget:
                continue
            wrong = by_budget.get(run.tokens, by_budget[min(by_budget)])
            outcomes = [run.records[key]["correct"] for key in sorted(wrong & run.records.keys())]
            if outcomes:
                found[run.path] = Hard(100 * math.fsum(outcomes) / len(outcomes), len(outcomes))
        return found

    def _questions(self, run: RunDirectory) -> tuple[Task, list[Doc]]:
        """Load the benchmark a run was made on, once."""
        config = run.manifest["config"]
        key = _cell_key(run)
        if key not in self._tasks:
            self._tasks[key] = questions_of(run)
        task, docs = self._tasks[key]
        missing = [doc.id for doc in docs if doc.id not in run.records]
        if missing:
            raise UsageError(f"{run.path}: {config['task']} has no record of sample {missing[0]}")
        return task, docs


def questions_of(run: RunDirectory, pictures: bool = False) -> tuple[Task, list[Doc]]:
    """Load the benchmark that a run was made on.

    Parameters
    ----------
    run : RunDirectory
        A run.
    pictures : bool
        Whether the pictures are wanted too.

    Raises
    ------
    UsageError
        If the data is not there, or is not what the run was made on.
    """
    config, about = run.manifest["config"], run.manifest["about"]
    loaded = load_task(
        config["task"],
        about["data"],
        split=about.get("split"),
        limit=about.get("limit"),
        **config["task_options"],
    )
    if loaded.fingerprint != config["data"].removesuffix(SHUFFLED):
        raise UsageError(f"the data in {about['data']} is not what the run began with: {run.path}")
    return loaded.task, list(loaded.docs) if pictures else loaded.to_score()


def name_of(run: RunDirectory) -> str:
    """Name a row: the method and its budget."""
    config = run.manifest["config"]
    return "-".join(filter(None, (config["method"], config["tokens"])))


def _names(run: RunDirectory) -> tuple[str, ...]:
    return name_of(run), run.manifest["config"]["weights"].get("checkpoint", "")


def _cell_key(run: RunDirectory) -> str:
    config: Mapping[str, Any] = run.manifest["config"]
    return json.dumps([config[name] for name in SAME], sort_keys=True)


def _pairs(docs: Iterable[Doc], run: RunDirectory) -> list[tuple[Doc, str | None]]:
    return [(doc, run.records[doc.id]["response"]) for doc in docs]
