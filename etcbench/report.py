"""One table of runs: a row per model, method and budget, a column per benchmark.

Runs share a row only if everything about the model and the method is the same, and a column only
if everything about the benchmark is (rows of data, prompt style, rule set, answer length). What
differs is written into the label; what may not be compared is marked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from etcbench.controls import SHUFFLED, pictures_shuffled
from etcbench.errors import UsageError
from etcbench.figures import UNITS, csv_of, digits_of
from etcbench.paired import Difference, Hard, Pairing, questions_of
from etcbench.store import RunDirectory, find_runs

_COLUMN = ("task", "task_options", "data", "style", "mode", "max_new_tokens")
_LONG_HASH = re.compile(r"\b([0-9a-f]{6})[0-9a-f]{4,}\b")


@dataclass(frozen=True)
class Table:
    """Runs side by side.

    Attributes
    ----------
    columns : list of str
        Headings.
    rows : list of list of str
        Cells, formatted.
    notes : list of str
        Lines that belong under the table: micro figures, what is not shown and why.
    runs : list of dict
        One flat record per run, for machines.
    refused : int
        Scores that are not shown because samples are missing.
    """

    columns: list[str]
    rows: list[list[str]]
    notes: list[str]
    runs: list[dict[str, Any]]
    refused: int = 0


@dataclass
class _Entry:
    """A run with the keys that place it in the table."""

    run: RunDirectory
    summary: Mapping[str, Any]
    shown: bool
    row: Hashable = ""
    column: Hashable = ""
    labels: dict[str, str] = field(default_factory=dict)
    difference: Difference | None = None
    hard: Hard | None = None

    @property
    def config(self) -> dict[str, Any]:
        return self.run.manifest["config"]


def compare(
    *paths: str | Path, partial: bool = False, baseline: str | None = None, hard: bool = False
) -> Table:
    """Put runs into one table.

    Parameters
    ----------
    *paths : str or Path
        Run directories, or folders with runs in them.
    partial : bool
        Also show scores of runs with missing or failed samples, with their n.
    baseline, hard
        See `tabulate_runs`.

    Raises
    ------
    UsageError
        If there is no run, one is damaged, or the baseline is not among them.
    """
    folders = [folder for path in paths for folder in find_runs(Path(path))]
    if not folders:
        raise UsageError(f"no runs in {', '.join(map(str, paths))}; start one with etcbench run")
    runs = [RunDirectory.read(folder) for folder in dict.fromkeys(folders)]
    return tabulate_runs(in_order(runs), partial, baseline, hard)


def in_order(runs: Iterable[RunDirectory]) -> list[RunDirectory]:
    """Sort runs as tables show them: by model, then by falling number of tokens."""
    return sorted(runs, key=_order)


def tabulate_runs(
    runs: Sequence[RunDirectory],
    partial: bool = False,
    baseline: str | None = None,
    hard: bool = False,
) -> Table:
    """Build the table of these runs, rows and columns in the order given.

    Parameters
    ----------
    runs : sequence of RunDirectory
        The runs.
    partial : bool
        Also show scores of runs with missing or failed samples, with their n.
    baseline : str, optional
        ``full``, or a method with its budget as ``voco-1``: every cell also says how far it is
        from this row's, paired on the same samples.
    hard : bool
        Add the score on the hard samples (`etcbench.paired.Hard`).
    """
    entries, notes = [], []
    for run in runs:
        summary, note = _summary(run, partial)
        notes += [note] if note else []
        if summary is not None:
            whole = summary["n_error"] == summary["n_missing"] == 0
            entries.append(_Entry(run, summary, whole or partial))
    _place(entries)
    if baseline is not None or hard:
        notes += _pair(entries, baseline, hard)
    rows = _unique(entry.row for entry in entries)
    tasks = _unique(entry.config["task"] for entry in entries)
    by_task = sorted(entries, key=lambda entry: tasks.index(entry.config["task"]))
    # What is asked about wrong pictures is a control and stands behind the scores.
    last = sorted(by_task, key=lambda entry: pictures_shuffled(entry.config["data"]))
    columns = _unique(entry.column for entry in last)
    cells = {(entry.row, entry.column): entry for entry in entries}
    lead = ["model", "method", "tokens", "tokens into LLM", "layer average"]
    headings = [_heading([e for e in entries if e.column == column]) for column in columns]
    table = []
    for row in rows:
        members = [entry for entry in entries if entry.row == row]
        table.append([*_row_head(members), *(_cell(cells.get((row, c))) for c in columns)])
    micro = next((e.summary["micro"] for e in entries if e.summary["micro"]), None)
    return Table(
        columns=lead + headings,
        rows=table,
        notes=([micro] if micro else []) + notes,
        runs=[_flat(entry) for entry in entries],
        refused=len(runs) - sum(entry.shown for entry in entries),
    )


def render(table: Table, form: str) -> str:
    """Write a table as ``"md"``, ``"csv"`` or ``"json"``; the last two give one record per run.

    Raises
    ------
    UsageError
        If there is no such format.
    """
    if form not in FORMATS:
        raise UsageError(f"--format {form!r} is not one of {', '.join(FORMATS)}")
    return FORMATS[form](table)


def _markdown(table: Table) -> str:
    from tabulate import tabulate

    body = tabulate(table.rows, table.columns, tablefmt="pipe", disable_numparse=True)
    return "\n\n".join([body, *table.notes])


def _csv(table: Table) -> str:
    return csv_of(table.runs)


def _json(table: Table) -> str:
    return json.dumps({"runs": table.runs, "notes": table.notes}, indent=2, ensure_ascii=False)


# A further format is one function from Table to str and one entry here.
FORMATS: dict[str, Callable[[Table], str]] = {"md": _markdown, "csv": _csv, "json": _json}


def _summary(run: RunDirectory, partial: bool) -> tuple[Mapping[str, Any] | None, str]:
    """Summary of a run, scored on the spot when it is unfinished, and what to say about it."""
    where = run.path
    if run.summary is not None:
        errors, n = run.summary["n_error"], run.summary["n"]
        if errors and partial:
            return run.summary, f"partial: {where}: {errors} of {n} samples failed, counted wrong"
        if errors:
            return run.summary, (
                f"not shown: {where}: {errors} of {n} samples failed; the same command asks them "
                "again, --partial shows the score"
            )
        return run.summary, ""
    if not partial:
        return None, (
            f"not shown: {where}: unfinished, {len(run.records)} samples so far; the same command "
            "continues it, --partial shows the score"
        )
    try:
        summary = _unfinished(run)
    except UsageError as error:
        return None, f"not shown: {where}: {error}"
    n = summary["n"]
    return summary, f"partial: {where}: unfinished, {n} of {n + summary['n_missing']} samples"


def _unfinished(run: RunDirectory) -> dict[str, Any]:
    """Score what an unfinished run has; needs the data it ran on."""
    from etcbench.summary import summarise

    task, docs = questions_of(run)
    marks = run.manifest["about"]["marks"]
    return summarise(task, docs, run.records, run.manifest["config"]["mode"], marks)


def _place(entries: Sequence[_Entry]) -> None:
    """Give every entry its row and column, and the labels that tell similar ones apart."""
    taken: dict[tuple[Hashable, Hashable], int] = {}
    for entry in entries:
        column = {name: entry.config[name] for name in _COLUMN}
        row = {name: value for name, value in entry.config.items() if name not in column}
        entry.row, entry.column = _key(row), _key(column)
        copy = taken.get((entry.row, entry.column), 0)
        taken[entry.row, entry.column] = copy + 1
        if copy:
            # the same config in another folder: a row of its own, named after the folder
            entry.row = (entry.row, copy)
            entry.labels["copy"] = str(entry.run.path)
    for group in _alike(entries, ("model", "method", "tokens")):
        _label(group, "row", ("model", "preprocessing", "dtype", "options", "weights", "seed"))
    for group in _alike(entries, ("task",)):
        _label(group, "column", _COLUMN[1:])


def _pair(entries: Sequence[_Entry], baseline: str | None, hard: bool) -> list[str]:
    """Add differences and hard samples to the entries; returns what a reader must know."""
    pairing = Pairing([entry.run for entry in entries if entry.shown])
    differences = pairing.differences(baseline) if baseline is not None else {}
    hard_scores = pairing.hard() if hard else {}
    for entry in entries:
        entry.difference = differences.get(entry.run.path)
        entry.hard = hard_scores.get(entry.run.path)
    notes = []
    if baseline is not None:
        notes.append(f"behind ;: difference to {baseline}, paired on the same samples")
    if hard:
        notes.append(
            "hard: % right of the samples that the picture reduced to as many tokens (downsample) "
            "gets wrong" + ("" if hard_scores else "; needs runs of downsample, there are none")
        )
    return notes


def _label(alike: Sequence[_Entry], where: str, parts: Sequence[str]) -> None:
    """Label entries of the same name with the parts of their configs in which they differ."""
    flats = [_flatten({part: entry.config[part] for part in parts}) for entry in alike]
    for flat in flats:
        if pictures_shuffled(str(flat.get("data", ""))):
            flat |= {"data": flat["data"].removesuffix(SHUFFLED), "pictures": "shuffled"}
    names = sorted(set().union(*flats))
    varying = [name for name in names if len({_key(flat.get(name)) for flat in flats}) > 1]
    for entry, flat in zip(alike, flats, strict=True):
        shown = {name.removeprefix("options."): flat[name] for name in varying if name in flat}
        label = ", ".join(f"{name}={value}" for name, value in shown.items())
        entry.labels[where] = _LONG_HASH.sub(r"\1", label)


def _alike(entries: Sequence[_Entry], names: Sequence[str]) -> list[list[_Entry]]:
    def name(entry: _Entry) -> str:
        named = {**entry.config, "model": entry.config["model"]["name"]}
        return _key([named[part] for part in names])

    return [list(group) for _, group in groupby(sorted(entries, key=name), key=name)]


def _heading(members: Sequence[_Entry]) -> str:
    first = members[0]
    metric = next(iter(first.summary["headline"]))
    parts = [f"{first.config['task']} {metric}{UNITS[first.summary['unit']]}"]
    if label := first.labels["column"]:
        parts.append(f"({label})")
    if "micro data" in first.summary["marks"]:
        parts.append("[micro]")
    samples = {entry.summary["n"] + entry.summary["n_missing"] for entry in members}
    parts.append("n=" + "/".join(map(str, sorted(samples))))
    return " ".join(parts)


def _row_head(members: Sequence[_Entry]) -> list[str]:
    config, labels = members[0].config, members[0].labels
    marks = {mark for entry in members for mark in entry.summary["marks"]}
    model = config["model"]["name"] + (" [micro]" if "micro model" in marks else "")
    method = config["method"]
    method += "".join(f" ({labels[k]})" for k in ("row", "copy") if labels.get(k))
    method += " [untrained]" if "untrained" in marks else ""
    entering = _span([entry.summary["tokens"]["entering"] for entry in members])
    average = _span([entry.summary["tokens"]["layer_average"] for entry in members])
    return [model, method, config["tokens"] or entering, entering, average]


def _cell(entry: _Entry | None) -> str:
    if entry is None:
        return ""
    if not entry.shown:
        return "not shown"
    summary = entry.summary
    value = next(iter(summary["headline"].values()))
    interval = summary["interval"]
    digits = digits_of(summary["unit"])
    text = f"{value:.{digits}f} [{interval['low']:.{digits}f}, {interval['high']:.{digits}f}]"
    if (apart := entry.difference) is not None:
        text += f"; {apart.value:+.{digits}f} [{apart.low:+.{digits}f}, {apart.high:+.{digits}f}]"
    if entry.hard is not None:
        text += f"; hard {entry.hard.value:.1f} (n={entry.hard.n})"
    if summary["n_missing"] or summary["n_error"]:
        asked = summary["n"] + summary["n_missing"]
        text += f" partial, n={summary['n'] - summary['n_error']} of {asked}"
    return text


def _flat(entry: _Entry) -> dict[str, Any]:
    """One record per run; a refused score is absent."""
    config, summary = entry.config, entry.summary
    interval = summary["interval"]
    metric, value = next(iter(summary["headline"].items()))
    return {
        "model": config["model"]["name"],
        "method": config["method"],
        "tokens": config["tokens"],
        "variant": entry.labels["row"],
        "entering": summary["tokens"]["entering"],
        "layer_average": summary["tokens"]["layer_average"],
        "cached": summary["tokens"]["cached"],
        **entry.run.drafting(),
        "task": config["task"],
        "metric": metric,
        "value": value if entry.shown else None,
        "low": interval["low"] if entry.shown else None,
        "high": interval["high"] if entry.shown else None,
        **({} if entry.difference is None else _prefixed("difference", entry.difference)),
        **({} if entry.hard is None else _prefixed("hard", entry.hard)),
        "unit": summary["unit"],
        "n": summary["n"],
        "n_unparsed": summary["n_unparsed"],
        "n_error": summary["n_error"],
        "n_missing": summary["n_missing"],
        "mode": config["mode"],
        "style": config["style"],
        "data": config["data"],
        "marks": ", ".join(summary["marks"]),
        "micro": summary["micro"],
        "run": str(entry.run.path),
    }


def _prefixed(name: str, figures: Difference | Hard) -> dict[str, Any]:
    return {f"{name}_{key}": value for key, value in asdict(figures).items()}


def _span(values: Iterable[float | None]) -> str:
    """Format one figure, or the range of several, to a tenth."""
    shown = sorted({round(value, 1) for value in values if value is not None})
    if not shown:
        return ""
    return f"{shown[0]:g}" if len(shown) == 1 else f"{shown[0]:g}-{shown[-1]:g}"


def _order(run: RunDirectory) -> tuple[Any, ...]:
    """Models by name, then by falling number of tokens however a method counts them."""
    config = run.manifest["config"]
    tokens = float(run.tokens)
    if run.summary and run.summary["tokens"]["entering"] is not None:
        counts = run.summary["tokens"]
        tokens = min(counts["entering"], counts["layer_average"])
    return (config["model"]["name"], -tokens, config["method"], config["task"])


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            flat.update(_flatten(inner, f"{prefix}{key}."))
        else:
            flat[prefix + key] = inner
    return flat


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _unique(values: Iterable[Hashable]) -> list[Hashable]:
    return list(dict.fromkeys(values))
