"""What there is to choose from: methods, benchmarks, models, runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from etcbench import registry
from etcbench.errors import unknown_name
from etcbench.presets import presets_of


@dataclass(frozen=True)
class Catalog:
    """A list for the terminal: headings and rows."""

    columns: list[str]
    rows: list[list[str]]


def methods() -> Catalog:
    """Every method with what it needs and its options."""
    rows = []
    for name in registry.names("baselines"):
        method = registry.load("baselines", name)
        options = [f"{f.name}={f.default}" for f in fields(method) if f.init and f.name != "budget"]
        rows.append(
            [
                name,
                "--tokens N" if method.takes_budget else "no budget",
                "trained" if method.trained else "training-free",
                "yes" if method.query_aware else "no",
                ", ".join(options),
                ", ".join(f"{preset.name} ({preset.source})" for preset in presets_of(name)),
                _first_line(method),
            ]
        )
    headings = ["method", "budget", "weights", "query-aware", "options", "presets", "what it does"]
    return Catalog(headings, rows)


def tasks() -> Catalog:
    """Every benchmark with its rule sets, prompt styles and where its data comes from."""
    from etcbench.loading import MICRO, task_names

    rows = []
    for name in task_names():
        if name not in registry.names("tasks"):
            continue
        task = registry.load("tasks", name)
        embedded = any(MICRO.glob(f"{task.stem or name}*"))
        rows.append(
            [
                name,
                ", ".join(f"{name}_{variant}" for variant in task.variants),
                ", ".join(task.modes),
                ", ".join(task.styles),
                "micro, hub" if embedded else "hub",
                _first_line(task),
            ]
        )
    return Catalog(["task", "variants", "modes", "styles", "data", "what it asks"], rows)


def models() -> Catalog:
    """Embedded models with their checkpoints, and the families that can be named otherwise."""
    from etcbench.backbones.loading import families, micro_models
    from etcbench.checkpoints import shipped

    rows = []
    for name in micro_models():
        checkpoints = ", ".join(path.name for path in shipped(name)) or "no checkpoints"
        rows.append([name, "embedded (micro)", checkpoints])
    for kind, family in sorted(families().items()):
        rows.append(["a directory or hub id", f"model_type {kind}", _first_line(family)])
    return Catalog(["model", "kind", "note"], rows)


def runs(root: Path) -> Catalog:
    """Every run below a folder and how far it is."""
    from etcbench.store import RunDirectory, find_runs

    rows = []
    for path in find_runs(root):
        run = RunDirectory.read(path)
        config, marks = run.manifest["config"], run.manifest["about"]["marks"]
        state = f"unfinished, {len(run.records)} samples"
        if run.summary is not None:
            errors = run.summary["n_error"]
            state = f"done, n={run.summary['n']}" + (f", {errors} failed" if errors else "")
        rows.append(
            [
                config["model"]["name"],
                config["method"],
                config["tokens"] or "",
                config["task"],
                state,
                ", ".join(marks),
                str(path),
            ]
        )
    return Catalog(["model", "method", "tokens", "task", "state", "marks", "run"], rows)


def catalog(kind: str, root: Path) -> Catalog:
    """Look one of the lists up by its name.

    Raises
    ------
    UsageError
        If there is no such list.
    """
    lists: dict[str, Callable[[], Catalog]] = {
        "methods": methods,
        "tasks": tasks,
        "models": models,
        "runs": lambda: runs(root),
    }
    if kind not in lists:
        raise unknown_name("list", kind, lists)
    return lists[kind]()


def _first_line(thing: type) -> str:
    return (inspect.getdoc(thing) or "").partition("\n")[0].rstrip(".")
