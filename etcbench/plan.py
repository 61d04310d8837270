"""A comparison as a file: the sweeps that belong to it, and where their runs are kept.

A plan is YAML. ``runs`` lists sweeps, each with the fields of `etcbench.sweep.Sweep` that differ
from the defaults at the top of the file::

    defaults: {models: [micro-llava], tasks: [mme, pope]}
    runs:
      - {methods: [full, blind]}
      - {methods: [fastv, visionzip], tokens: [21, 14]}
      - {methods: [etc], tokens: [1], checkpoint: checkpoints/etc-1-seed1}
    include: [ablations/plan.yaml]

Paths are relative to the plan. The runs lie in ``runs/`` beside it, if nothing else is said. An
included plan is a comparison of its own, with tables of its own: what was trained on another
schedule must not stand in one table with the rest. ``title`` heads its report, ``baseline`` names
the row that its scores are compared to.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from etcbench.compressor import Budget
from etcbench.engine import Settings
from etcbench.errors import UsageError
from etcbench.store import pack
from etcbench.sweep import Outcome, Sweep, run_sweep

RUNS = "runs"


@dataclass(frozen=True)
class Plan:
    """A comparison.

    Attributes
    ----------
    file : Path
        Where it was read from.
    entries : tuple of mapping
        Fields of each sweep, defaults filled in.
    title : str
        Heading of its report.
    baseline : str
        Row to which its scores are compared (`etcbench.paired.Pairing.differences`).
    included : tuple of Plan
        Comparisons that belong to it and have folders of their own.
    """

    file: Path
    entries: tuple[Mapping[str, Any], ...]
    title: str = "etcbench: a comparison"
    baseline: str = "full"
    included: tuple[Plan, ...] = ()

    def parts(self, folder: Path) -> Iterator[tuple[Plan, Path]]:
        """Give this plan and all that it includes, each with its folder, from this one's."""
        yield self, folder
        for plan in self.included:
            inside = os.path.relpath(plan.file.parent, self.file.parent)
            yield from plan.parts(folder / inside)

    def sweeps(self, out: Path, batch_size: int) -> Iterator[Sweep]:
        """Give the sweeps, one per entry and model."""
        for entry in self.entries:
            fields = dict(entry)
            models = fields.pop("models")
            budgets = [Budget.parse(str(text)) for text in fields.pop("tokens", ())]
            checkpoint = fields.pop("checkpoint", None)
            if checkpoint is not None:
                checkpoint = str(self.file.parent / checkpoint)
            for model in models:
                yield Sweep(
                    model=model,
                    budgets=budgets,
                    checkpoint=checkpoint,
                    settings=Settings(batch_size=batch_size),
                    out=out,
                    **fields,
                )


_PARTS = ("title", "baseline", "defaults", "runs", "include")
_FIELDS = (
    *("models", "methods", "tasks", "tokens", "checkpoint", "options", "seed"),
    *("shuffle_pictures", "data", "limit", "mode", "split"),
)


def load_plan(file: Path) -> Plan:
    """Read a plan.

    Raises
    ------
    UsageError
        If the file, or one that it includes, does not exist, or an entry has an unknown field or
        misses one.
    """
    if not file.is_file():
        raise UsageError(f"no plan {file}; name a YAML file with a list of runs")
    try:
        raw = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise UsageError(f"plan {file} is not YAML: {error}") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("runs"), list):
        raise UsageError(f"{file} is no plan: it needs a list of runs")
    if unknown := sorted(set(raw) - set(_PARTS)):
        raise UsageError(f"{file}: unknown {', '.join(unknown)}; a plan has {', '.join(_PARTS)}")
    entries = []
    for number, entry in enumerate(raw["runs"], 1):
        fields = {**raw.get("defaults", {}), **entry}
        if unknown := sorted(set(fields) - set(_FIELDS)):
            raise UsageError(
                f"{file}, run {number}: unknown field {', '.join(unknown)}; there is "
                f"{', '.join(_FIELDS)}"
            )
        if missing := [name for name in ("models", "methods", "tasks") if not fields.get(name)]:
            raise UsageError(f"{file}, run {number}: {', '.join(missing)} missing")
        fields["options"] = {k: str(v) for k, v in fields.get("options", {}).items()}
        entries.append(fields)
    about = {name: str(raw[name]) for name in ("title", "baseline") if name in raw}
    included = tuple(load_plan(file.parent / name) for name in raw.get("include", ()))
    return Plan(file, tuple(entries), included=included, **about)


def reproduce(plan: Plan, out: Path, batch_size: int = 32) -> list[Outcome]:
    """Run every cell of a plan that has not finished yet, and compress what has.

    The same call continues where an earlier one stopped; a finished cell is only read.

    Parameters
    ----------
    plan : Plan
        From `load_plan`.
    out : Path
        Folder of the runs.
    batch_size : int
        Questions answered together.
    """
    outcomes = []
    for sweep in plan.sweeps(out, batch_size):
        for outcome in run_sweep(sweep):
            outcomes.append(outcome)
            if outcome.run is not None and outcome.run.finished:
                pack(outcome.run.path)
    return outcomes
