"""Products of methods, budgets and benchmarks on one model: load once, run every cell."""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from etcbench.backbones import Backbone, load_backbone
from etcbench.backbones.loading import micro_models
from etcbench.compressor import Budget
from etcbench.console import notice, waiting
from etcbench.controls import ShuffledPictures
from etcbench.engine import Settings
from etcbench.environment import check_device
from etcbench.errors import BudgetError, MissingCheckpointError, UsageError, unknown_name
from etcbench.loading import LoadedTask, load_task, make_task
from etcbench.options import typed_options
from etcbench.presets import NAMED, method_class
from etcbench.run import LoadedMethod, evaluate, load_compressor
from etcbench.store import RunDirectory

# What a method cannot do on a model is a result of a sweep, not a failure of it.
EXPECTED = (BudgetError, MissingCheckpointError)
SHOWN_FAILURES = 3
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True)
class Cell:
    """One entry of a sweep."""

    method: str
    budget: Budget | None
    task: str

    def __str__(self) -> str:
        return " ".join(filter(None, (self.method, self.tokens, self.task)))

    @property
    def tokens(self) -> str | None:
        """The budget as written."""
        return None if self.budget is None else str(self.budget)


@dataclass(frozen=True)
class Outcome:
    """What became of a cell: a run on disk, or the reason why there is none."""

    cell: Cell
    run: RunDirectory | None = None
    error: Exception | None = None

    @property
    def reason(self) -> str:
        """Why there is no run, in one line."""
        if self.error is None:
            return ""
        text = str(self.error).strip().split("\n")[0]
        return (
            text if isinstance(self.error, UsageError) else f"{type(self.error).__name__}: {text}"
        )


@dataclass(frozen=True)
class Sweep:
    """A product of methods, budgets and benchmarks on one model.

    Attributes
    ----------
    methods, tasks : sequence of str
        Names; a method's may be that of a preset (`etcbench.presets`).
    budgets : sequence of Budget
        Token budgets; a method that takes none runs once.
    model : str or None
        See `load_backbone`.
    data : str
        See `load_task`.
    limit, split, style, mode
        See `load_task`, `Settings` and `Task`.
    options, model_options : mapping of str to str
        ``KEY=VALUE`` pairs: of the methods that have such an option, and of the model's family.
    checkpoint, untrained
        Weights of trained methods, or of a tuned model (`checkpoint_of`).
    shuffle_pictures : bool
        Ask every question on the pictures of another group (`ShuffledPictures`).
    out : Path
        Folder of the run directories.
    """

    methods: Sequence[str]
    tasks: Sequence[str]
    budgets: Sequence[Budget] = ()
    model: str | None = None
    data: str = "micro"
    limit: int | None = None
    split: str | None = None
    mode: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    model_options: Mapping[str, str] = field(default_factory=dict)
    checkpoint: str | None = None
    untrained: bool = False
    device: str | None = None
    dtype: str | None = None
    attention: str = "sdpa"
    seed: int = 0
    shuffle_pictures: bool = False
    settings: Settings = field(default_factory=Settings)
    out: Path = Path("runs")

    def variants(self) -> list[tuple[str, Budget | None]]:
        """List every (method, budget) once.

        Methods that are the same at every budget, and presets, are there once.

        Raises
        ------
        UsageError
            If only presets could have taken the budgets: they have their own.
        """
        found: list[tuple[str, Budget | None]] = []
        for name in self.methods:
            takes_budget = method_class(name).takes_budget and name not in NAMED
            found += (
                [(name, b) for b in (self.budgets or (None,))] if takes_budget else [(name, None)]
            )
        named = [name for name in self.methods if name in NAMED]
        if named and self.budgets and not any(budget for _, budget in found):
            raise UsageError(
                f"{', '.join(named)}: a setting has its own budget; leave out --tokens"
            )
        return list(dict.fromkeys(found))

    def checkpoint_of(self, name: str) -> str | None:
        """Checkpoint for a method.

        Methods with weights get it, beside others that run on the model as it is; where no method
        has weights, it is a tuned model, and all run on that.
        """
        options = self.method_options()
        with_weights = [
            method
            for method in self.methods
            if (kind := method_class(method)).trained or kind.needs_weights(options[method])
        ]
        return self.checkpoint if name in with_weights or not with_weights else None

    def method_options(self) -> dict[str, dict[str, Any]]:
        """Give each method those of the options that it has.

        Raises
        ------
        UsageError
            If none of the methods has an option, or a value is not of its type.
        """
        return typed_options({name: method_class(name) for name in self.methods}, self.options)

    def build(self, name: str, budget: Budget | None, model: Backbone) -> LoadedMethod:
        """Build one of the methods on a model, with its share of options and weights.

        Raises
        ------
        UsageError
            As `load_compressor`.
        """
        return load_compressor(
            name,
            budget,
            model,
            checkpoint=self.checkpoint_of(name),
            untrained=self.untrained,
            seed=self.seed,
            **self.method_options()[name],
        )

    def open(self, name: str) -> LoadedTask:
        """Open one of the benchmarks, on the wrong pictures where that is the control.

        Raises
        ------
        UsageError
            As `load_task`.
        """
        task = load_task(name, self.data, split=self.split, limit=self.limit)
        if self.shuffle_pictures:
            return replace(task, docs=ShuffledPictures(task.docs))
        return task


def run_sweep(sweep: Sweep) -> list[Outcome]:
    """Run every cell of a sweep; the failure of one does not stop the others.

    Raises
    ------
    UsageError
        If a name, an option or the model is wrong, or no benchmark can be opened: nothing ran.
    """
    variants = sweep.variants()
    sweep.method_options()  # a wrong option is said before anything is loaded
    if sweep.model is not None:
        _check_model(sweep.model)
    for name in sweep.tasks:
        make_task(name).mode(sweep.mode)
    tasks = {name: _open(sweep, name) for name in dict.fromkeys(sweep.tasks)}
    broken = [task for task in tasks.values() if isinstance(task, UsageError)]
    if len(broken) == len(tasks):
        raise broken[0]
    check_device(sweep.device, sweep.dtype, sweep.attention)
    with waiting("loading the model"):
        model = load_backbone(
            sweep.model,
            device=sweep.device,
            dtype=sweep.dtype,
            attention=sweep.attention,
            **sweep.model_options,
        )
    outcomes = []
    for name, budget in variants:
        method = _built(sweep, name, budget, model)
        for task_name, task in tasks.items():
            outcomes.append(_run_cell(sweep, Cell(name, budget, task_name), model, method, task))
    return outcomes


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """0 all done, 1 samples or cells failed, 2 nothing could run as asked.

    A method that cannot serve a budget, or has no checkpoint, does not fail a sweep in which
    something else ran.
    """
    if any(o.error and not isinstance(o.error, UsageError) for o in outcomes):
        return 1
    runs = [o.run for o in outcomes if o.run is not None]
    if not runs:
        return 2
    misused = any(o.error and not isinstance(o.error, EXPECTED) for o in outcomes)
    return int(misused or not all(run.finished for run in runs))


def _check_model(model: str) -> None:
    """Refuse what is neither embedded, a directory nor a hub id, without asking the hub."""
    if model in micro_models() or Path(model).is_dir():
        return
    if "/" not in model:
        raise unknown_name("model", model, micro_models())
    if not _HUB_ID.fullmatch(model):
        raise UsageError(f"model directory {model} does not exist")


def _open(sweep: Sweep, name: str) -> LoadedTask | UsageError:
    try:
        with waiting(f"opening {name}"):
            return sweep.open(name)
    except UsageError as error:
        return error


def _built(
    sweep: Sweep, name: str, budget: Budget | None, model: Backbone
) -> LoadedMethod | Exception:
    try:
        return sweep.build(name, budget, model)
    except Exception as error:
        return _noted(error)


def _run_cell(
    sweep: Sweep,
    cell: Cell,
    model: Backbone,
    method: LoadedMethod | Exception,
    task: LoadedTask | UsageError,
) -> Outcome:
    for part in (method, task):
        if isinstance(part, Exception):
            return Outcome(cell, error=part)
    assert isinstance(method, LoadedMethod) and isinstance(task, LoadedTask)
    about = {"split": sweep.split, "limit": sweep.limit}
    try:
        run = evaluate(
            model,
            method,
            task,
            settings=sweep.settings,
            mode=sweep.mode,
            out=sweep.out,
            about=about,
        )
    except Exception as error:
        return Outcome(cell, error=_noted(error))
    _announce(cell, run)
    return Outcome(cell, run=run)


def _announce(cell: Cell, run: RunDirectory) -> None:
    """Say what came out of a cell as soon as it is known, with the samples that failed."""
    assert run.summary is not None
    marks = "".join(f" [{mark}]" for mark in run.summary["marks"])
    metric, value = next(iter(run.summary["headline"].items()))
    n, errors = run.summary["n"], run.summary["n_error"]
    score = f"{errors} of {n} samples failed" if errors else f"{metric} {value:.1f}, n={n}"
    notice(f"{cell}: {score}{marks} -> {run.path}")
    failed = [record for record in run.records.values() if record["status"] == "error"]
    for record in failed[:SHOWN_FAILURES]:
        notice(f"{cell}: sample {record['id']}: {record['error']}")
    if len(failed) > SHOWN_FAILURES:
        notice(f"{cell}: {len(failed) - SHOWN_FAILURES} more in {run.path / 'records.jsonl'}")


def _noted(error: Exception) -> Exception:
    """Show where something broke that should not have; bad input is explained by its message."""
    if not isinstance(error, UsageError):
        traceback.print_exception(error)
    return error
