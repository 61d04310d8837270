"""A comparison as a file: the sweeps that belong to it, and where their runs are kept.

A plan is YAML. ``runs`` lists sweeps, each with the fields of `etcbench.sweep.Sweep` that differ
from the defaults at the top of the file::

    defaults: {models: [micro-llava], tasks: [mme, pope]}
    runs:
      - {methods: [full, blind]}
      - {methods: [fastv, visionzip], tokens: [21, 14]}
      - {methods: [etc], tokens: [1], checkpoint: checkpoints/etc-1-seed1}

Paths are relative to the plan. The runs lie in ``runs/`` beside it, if nothing else is said.
"""

from __future__ import annotations

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
    """

    file: Path
    entries: tuple[Mapping[str, Any], ...]

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


_FIELDS = (
    *("models", "methods", "tasks", "tokens", "checkpoint", "options", "seed"),
    *("shuffle_pictures", "data", "limit", "mode", "split"),
)


def load_plan(file: Path) -> Plan:
    """Read a plan.

    Raises
    ------
    UsageError
        If the file does not exist, or an entry has an unknown field or misses one.
    """
    if not file.is_file():
        raise UsageError(f"no plan {file}; name a YAML file with a list of runs")
    raw = yaml.safe_load(file.read_text())
    if not isinstance(raw, dict) or not isinstance(raw.get("runs"), list):
        raise UsageError(f"{file} is no plan: it needs a list of runs")
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
    return Plan(file, tuple(entries))


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
