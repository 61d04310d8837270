"""Find methods and benchmarks by name: built-in files and entry points of other packages.

A built-in is a file in ``baselines/`` or ``tasks/`` (imported as ``etcbench.baselines`` and
``etcbench.tasks``); the engine's own ETC is ``etcbench.etc``. Other packages add theirs through
the entry-point groups of the same names. Nothing is imported until it is asked for.
"""

from __future__ import annotations

import importlib
import pkgutil
from importlib.metadata import entry_points
from typing import Any, Literal

from etcbench.errors import UsageError, unknown_name

Group = Literal["baselines", "tasks"]
KINDS: dict[Group, str] = {"baselines": "method", "tasks": "task"}


def builtin_modules(group: Group) -> dict[str, str]:
    """Map the public name of each built-in to its module path."""
    package = importlib.import_module(f"etcbench.{group}")
    found = {
        module.name.replace("_", "-") if group == "baselines" else module.name: (
            f"etcbench.{group}.{module.name}"
        )
        for module in pkgutil.iter_modules(package.__path__)
        if not module.name.startswith("_")
    }
    if group == "baselines":
        found["etc"] = "etcbench.etc"
    return found


def names(group: Group) -> list[str]:
    """Every name that `load` accepts, sorted."""
    plugins = {point.name for point in entry_points(group=f"etcbench.{group}")}
    return sorted(plugins | set(builtin_modules(group)))


def load(group: Group, name: str) -> type[Any]:
    """Import one method or benchmark class.

    A built-in module names its class in ``METHOD`` or ``TASK``; an entry point names the class
    itself.

    Raises
    ------
    UsageError
        If no such name exists, with the nearest ones.
    """
    modules = builtin_modules(group)
    if name in modules:
        module = importlib.import_module(modules[name])
        return getattr(module, "METHOD" if group == "baselines" else "TASK")
    for point in entry_points(group=f"etcbench.{group}"):
        if point.name == name:
            try:
                return point.load()
            except ImportError as error:
                raise UsageError(
                    f"{KINDS[group]} {name!r} from {point.value} does not import: {error}"
                ) from error
    raise unknown_name(KINDS[group], name, names(group))
