"""Score against what it costs: a panel per benchmark, bands, and the Pareto front."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image

from etcbench.controls import pictures_shuffled
from etcbench.errors import UsageError
from etcbench.measured import label_of
from etcbench.palette import look_of
from etcbench.store import RunDirectory
from etcbench.summary import MICRO

# What may stand on the x axis: where it comes from, and its name.
IN_RUNS = {
    "tokens": ("entering", "tokens through which the text sees a picture"),
    "layer_average": ("layer_average", "visual tokens, averaged over the layers"),
}
IN_COSTS = {
    "kv": ("kv cache", "KV cache after prefill, bytes"),
    "flops": ("total flops", "FLOPs up to the first token"),
    "latency": ("first token time", "time to the first token, ms"),
}
AXES = (*IN_RUNS, *IN_COSTS)
AVERAGE = "average, % of full"
CROWD = 8  # methods in a panel above which bands are fainter, so that lines can be seen


@dataclass(frozen=True)
class Point:
    """One run or average in a figure.

    Attributes
    ----------
    method : str
        Method with its changed options.
    panel : str
        Benchmark, or `AVERAGE`.
    cost, score : float
        Where it stands.
    low, high : float
        95 % interval of the score; equal to it where there is none.
    budget : str
        Budget of the run; several may cost the same (learned tokens, counted over the layers that
        read the picture).
    """

    method: str
    panel: str
    cost: float
    score: float
    low: float
    high: float
    budget: str = ""


Costs = Mapping[tuple[str, str], Mapping[str, float]]


def read_costs(file: Path) -> Costs:
    """Read what ``etcbench measure --json`` printed: figures by method and tokens.

    Raises
    ------
    UsageError
        If it is no such file.
    """
    found: dict[tuple[str, str], dict[str, float]] = {}
    try:
        for figure in json.loads(file.read_text())["figures"]:
            cell = (figure["method"], str(figure["tokens"] or ""))
            found.setdefault(cell, {})[figure["figure"]] = float(figure["value"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--costs {file} is not what etcbench measure --json printed") from error
    return found


def points(runs: Sequence[RunDirectory], axis: str, costs: Costs | None = None) -> list[Point]:
    """Place finished runs of one model in a figure.

    Parameters
    ----------
    runs : sequence of RunDirectory
        Runs; unfinished ones and those on shuffled pictures are left out.
    axis : str
        One of `AXES`.
    costs : mapping, optional
        From `read_costs`; needed for what runs do not hold. Methods that it lacks are left out.

    Raises
    ------
    UsageError
        If there is no such axis, costs are missing, or the runs are of several models.
    """
    if axis not in AXES:
        raise UsageError(f"--x {axis!r} is not one of {', '.join(AXES)}")
    if axis in IN_COSTS and costs is None:
        raise UsageError(f"--x {axis} needs --costs FILE, what etcbench measure --json printed")
    usable = [
        run
        for run in runs
        if run.finished and not pictures_shuffled(run.manifest["config"]["data"])
    ]
    models = sorted({run.manifest["config"]["model"]["name"] for run in usable})
    if len(models) != 1:
        known = ", ".join(models) or "none that is finished"
        raise UsageError(f"a figure shows runs of one model; here are {known}")
    found = []
    for run in usable:
        config, summary = run.manifest["config"], run.summary
        assert summary is not None
        cost = _cost(run, axis, costs)
        if cost is None:
            continue
        score = next(iter(summary["headline"].values()))
        interval = summary["interval"]
        low, high = interval["low"], interval["high"]
        where = (label_of(config), config["task"], cost, score, low, high)
        found.append(Point(*where, budget=config["tokens"] or ""))
    found = _over_seeds(found)
    return found + _averages(found)


def _over_seeds(found: Sequence[Point]) -> list[Point]:
    """Average what differs in the seed of training alone; the band spans all their intervals."""
    grouped: dict[tuple[str, str, float, str], list[Point]] = {}
    for point in found:
        key = (point.method, point.panel, point.cost, point.budget)
        grouped.setdefault(key, []).append(point)
    return [
        replace(
            same[0],
            score=fmean(point.score for point in same),
            low=min(point.low for point in same),
            high=max(point.high for point in same),
        )
        for same in grouped.values()
    ]


def _cost(run: RunDirectory, axis: str, costs: Costs | None) -> float | None:
    config, summary = run.manifest["config"], run.summary
    assert summary is not None
    if axis in IN_RUNS:
        value = summary["tokens"][IN_RUNS[axis][0]]
        return None if value is None else float(value)
    assert costs is not None
    return costs.get((config["method"], config["tokens"] or ""), {}).get(IN_COSTS[axis][0])


def _averages(found: Sequence[Point]) -> list[Point]:
    """Average score / full over the benchmarks, where all that the full model has are there.

    A benchmark of which the full model answers nothing has no such ratio and is left out.
    """
    full = {p.panel: p.score for p in found if p.method == "full" and p.score > 0}
    if len(full) < 2:
        return []
    grouped: dict[tuple[str, float, str], dict[str, float]] = {}
    for point in found:
        # one budget costs a little differently on each benchmark, so it is rounded
        key = (point.method, float(f"{point.cost:.2g}"), point.budget)
        grouped.setdefault(key, {})[point.panel] = point.score
    averages = []
    for (method, cost, budget), scores in grouped.items():
        if scores.keys() >= full.keys():
            value = 100 * fmean(scores[name] / full[name] for name in full)
            averages.append(Point(method, AVERAGE, cost, value, value, value, budget))
    return averages


def pareto(found: Sequence[Point]) -> list[Point]:
    """Points that no other beats at the same or a lower cost, by rising cost."""
    front: list[Point] = []
    for point in sorted(found, key=lambda point: (point.cost, -point.score)):
        if not front or point.score > front[-1].score:
            front.append(point)
    return front


def draw(found: Sequence[Point], axis: str, files: Sequence[Path], micro: bool) -> None:
    """Draw a panel per benchmark.

    Lines join the budgets of a method, bands are 95 % intervals, the grey staircase is the Pareto
    front. Methods without a budget are horizontal lines; costs are on a logarithmic scale.

    Parameters
    ----------
    found : sequence of Point
        From `points`.
    axis : str
        One of `AXES`.
    files : sequence of Path
        Where to: ``.png``, ``.svg`` or ``.pdf``.
    micro : bool
        Whether to say that these are micro figures.

    Raises
    ------
    UsageError
        If there is nothing to draw or a file cannot be written.
    """
    if not found:
        raise UsageError("nothing to draw: no finished run has this cost")
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "etcbench"  # the same picture gives the same file
    from matplotlib import pyplot as plt

    panels = list(dict.fromkeys(point.panel for point in found))
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(4.2 * columns + 1.9, 3.1 * rows + 0.5),
        squeeze=False,
        layout="constrained",
    )
    for axes, panel in zip(grid.flat, panels, strict=False):
        _panel(axes, [point for point in found if point.panel == panel])
        if axis in IN_RUNS:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
        else:
            axes.set_xscale("log")
        axes.set_title(panel, fontsize=10)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    name = {**IN_RUNS, **IN_COSTS}[axis][1]
    figure.supxlabel(name, fontsize=10)
    figure.supylabel("score", fontsize=10)
    if micro:
        figure.suptitle(MICRO, fontsize=9)
    handles: dict[str, Any] = {}
    for axes in grid.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(), handles.keys(), loc="outside right upper", frameon=False, fontsize=9
    )
    try:
        for file in files:
            # no time of writing in the file
            when = {"Date": None} if file.suffix == ".svg" else None
            figure.savefig(file, dpi=100, metadata=when)
            if file.suffix == ".png":  # a palette makes it a third as large
                Image.open(file).convert("RGB").quantize(256).save(file, optimize=True)
    except (OSError, ValueError) as error:
        raise UsageError(f"--curve {file} cannot be written: {error}") from error
    finally:
        plt.close(figure)


def _panel(axes: Any, found: Sequence[Point]) -> None:
    methods: dict[str, list[Point]] = {}
    for point in found:
        methods.setdefault(point.method, []).append(point)
    compressed = [point for point in found if point.method not in ("full", "blind")]
    front = pareto(compressed)
    shade = 0.1 if len(methods) <= CROWD else 0.04
    if len(front) > 1:
        costs, scores = [p.cost for p in front], [p.score for p in front]
        axes.plot(
            costs,
            scores,
            drawstyle="steps-post",
            color="0.8",
            linewidth=5,
            zorder=0,
            label="Pareto front",
        )
    for method, members in methods.items():
        look = look_of(method)
        if method in ("full", "blind"):
            axes.axhline(
                members[0].score, color=look.colour, linestyle=look.line, lw=1, label=method
            )
            continue
        members.sort(key=lambda point: point.cost)
        costs = [point.cost for point in members]
        axes.plot(costs, [p.score for p in members], label=method, ms=5, lw=1.3, **look.plot)
        lows, highs = [p.low for p in members], [p.high for p in members]
        if len(members) > 1:
            axes.fill_between(costs, lows, highs, color=look.colour, alpha=shade, linewidth=0)
        else:
            axes.vlines(costs, lows, highs, color=look.colour, alpha=0.4)
    axes.grid(True, color="0.93", linewidth=0.6)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
