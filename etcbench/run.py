"""Evaluate one method on one benchmark, into a run directory."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from etcbench.backbones import Backbone
from etcbench.backbones.loading import micro_models
from etcbench.checkpoints import installed, load_method
from etcbench.compressor import Budget, Compressor
from etcbench.console import notice, progress
from etcbench.doc import Doc
from etcbench.engine import Settings, answers
from etcbench.environment import describe
from etcbench.errors import UsageError
from etcbench.loading import LoadedTask
from etcbench.presets import method_class, resolved
from etcbench.store import RunDirectory, differences, open_run, run_path
from etcbench.summary import record_of, summarise


@dataclass(frozen=True)
class LoadedMethod:
    """A compressor with the identity of its weights.

    Attributes
    ----------
    compressor : Compressor
        The method, built for one backbone and budget.
    weights : dict of str to str
        ``{"checkpoint", "content"}``, ``{"untrained": "yes"}``, or nothing for a method without
        weights.
    seed : int
        What its random parts were drawn with.
    """

    compressor: Compressor
    weights: dict[str, str] = field(default_factory=dict)
    seed: int = 0

    @property
    def options(self) -> dict[str, Any]:
        """Every option with the value it has, defaults included."""
        names = (f.name for f in fields(self.compressor) if f.init and f.name != "budget")
        return {name: getattr(self.compressor, name) for name in names}


def load_compressor(
    name: str,
    tokens: int | str | Budget | None,
    model: Backbone,
    *,
    checkpoint: str | None = None,
    untrained: bool = False,
    seed: int = 0,
    **options: Any,
) -> LoadedMethod:
    """Build a method for a model.

    Parameters
    ----------
    name : str
        A method, e.g. ``"etc"``, or a preset, e.g. ``"fastv-192"``.
    tokens : int, str, Budget or None
        Budget, e.g. ``64`` or ``"kept:64"``; None for a method that takes none.
    model : Backbone
        The model it compresses for.
    checkpoint : str, optional
        Directory of trained weights; default: those that come with an embedded model.
    untrained : bool
        Allow a trained method to run with random weights.
    seed : int
        Seed of random weights, and of the method's ``seed`` option if it has one.
    **options
        Options of the method.

    Raises
    ------
    UsageError
        If there is no such method, budget, option or checkpoint.
    """
    method = method_class(name)
    budget = tokens if isinstance(tokens, Budget) or tokens is None else Budget.parse(str(tokens))
    name, budget, options = resolved(name, budget, model.spec, options)
    if any(f.name == "seed" for f in fields(method)):
        options = {"seed": seed, **options}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        compressor, weights = load_method(
            name, budget, model, checkpoint=checkpoint, untrained=untrained, options=options
        )
    return LoadedMethod(compressor, weights, seed)


def evaluate(
    model: Backbone,
    method: LoadedMethod | Compressor,
    task: LoadedTask,
    *,
    settings: Settings | None = None,
    mode: str | None = None,
    out: str | Path = "runs",
    about: Mapping[str, Any] | None = None,
) -> RunDirectory:
    """Run a method on a benchmark, or continue a run that stopped; a finished one is only read.

    Parameters
    ----------
    model : Backbone
        From `load_backbone`.
    method : LoadedMethod or Compressor
        From `load_compressor`, or a compressor of your own.
    task : LoadedTask
        From `load_task`.
    settings : Settings, optional
        Batch size, prompt style, answer length, reuse.
    mode : str, optional
        Rule set of the scoring; the benchmark's first by default.
    out : str or Path
        Folder of the run directories.
    about : mapping, optional
        More to record in the manifest, beside what is hashed.

    Returns
    -------
    RunDirectory
        With ``summary`` filled in.

    Raises
    ------
    UsageError
        If the style, mode or directory is not usable.
    """
    if isinstance(method, Compressor):
        method = LoadedMethod(method)
    settings = settings or Settings()
    docs = task.to_score()
    config = config_of(model, method, task, settings, mode, docs)
    marks = marks_of(model, method, task)
    beside = {"data": task.data, "marks": marks, **(about or {})}
    with open_run(run_path(Path(out), config), config, beside) as run:
        for line in run.notices:
            notice(line)
        if run.finished:
            return run
        environment = describe(model)
        for process in run.manifest["processes"][-1:]:
            before = {name: process.get(name) for name in environment}
            if changed := differences(before, environment):
                notice(f"{run.path} continues under other conditions: {'; '.join(changed)}")
        run.begin(environment)
        done = run.answered
        names = (config["method"], config["tokens"], config["task"], *(f"[{m}]" for m in marks))
        label = " ".join(filter(None, names))
        with progress(label, len(docs), len(done)) as advance, installed(method.compressor, model):
            left = _left(task, done)
            for batch in answers(model, method.compressor, task.task, left, settings):
                run.append(record_of(task.task, answer, config["mode"]) for answer in batch)
                advance(len(batch))
        run.finish(summarise(task.task, docs, run.records, config["mode"], marks))
        return run


def config_of(
    model: Backbone,
    method: LoadedMethod,
    task: LoadedTask,
    settings: Settings,
    mode: str | None,
    docs: Sequence[Doc],
) -> dict[str, Any]:
    """Everything that may change an answer or the score; its hash names the run.

    Batch size, reuse and device are left out because they may not change an answer; the limit,
    because the fingerprint of the data names the rows.

    Raises
    ------
    UsageError
        If the benchmark has no such style or mode, or two samples share an id.
    """
    if not docs:
        raise UsageError(f"{task.task.name}: the data has no samples")
    if len({doc.id for doc in docs}) < len(docs):
        ids = [doc.id for doc in docs]
        twice = next(key for number, key in enumerate(ids) if key in ids[:number])
        raise UsageError(f"{task.task.name}: two samples have the id {twice!r}")
    task.task.prompt(docs[0], settings.style)
    budget = method.compressor.budget
    return {
        "model": model.identity,
        "preprocessing": model.options,
        "dtype": str(model.dtype).removeprefix("torch."),
        "method": method.compressor.name(),
        "tokens": None if budget is None else str(budget),
        "options": method.options,
        "weights": method.weights,
        "seed": method.seed,
        "task": task.task.name,
        "task_options": task_options(task.task),
        "data": task.fingerprint,
        "style": settings.style or task.task.styles[0],
        "mode": task.task.mode(mode),
        "max_new_tokens": settings.max_new_tokens or task.task.max_new_tokens,
    }


def task_options(task: Any) -> dict[str, Any]:
    """Options that a benchmark was built with: those of its parameters that it keeps."""
    if type(task).__init__ is object.__init__:
        return {}
    kept = vars(task)
    return {name: kept[name] for name in inspect.signature(type(task)).parameters if name in kept}


def marks_of(model: Backbone, method: LoadedMethod, task: LoadedTask) -> list[str]:
    """List what every table must say about a run."""
    marks = {
        "micro model": model.spec.name in micro_models(),
        "micro data": task.data == "micro",
        "untrained": "untrained" in method.weights,
    }
    return [mark for mark, applies in marks.items() if applies]


def _left(task: LoadedTask, done: set[str]) -> Iterator[Doc]:
    return (doc for doc in task.docs if doc.id not in done)
