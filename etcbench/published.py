"""Published numbers, as printed, and the tables of the papers they come from.

The numbers are csv files in ``results/published/`` of the repository; an installed package carries
a copy. Each says under which protocol it was measured, as far as that is known or can be inferred.
A cell measured under another protocol than its column asks for is shown with its own protocol
and never enters an average.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from statistics import fmean

import pandas as pd

from etcbench.console import show
from etcbench.errors import UsageError, unknown_name
from etcbench.paper_tables import PAPER_TABLES, Average, Column, PaperTable, Part
from etcbench.recorded import results_folder
from etcbench.tables import HEADING, Sheet, render_sheet

MISSING = "-"
_OTHER = (
    "In parentheses: measured under another protocol than the column; never averaged or ranked."
)
_UNPRINTED = "computed here: the paper prints none"


@dataclass(frozen=True)
class Published:
    """One published number.

    Attributes
    ----------
    paper, table : str
        Where it was published; `paper` is who measured it, not whose method it is.
    method : str
        Method, as in ``etcbench list methods`` where it is one of those, and what was varied, e.g.
        ``"etc[alpha=0.6]"``; ``"full"`` is the uncompressed model, ``"blind"`` sees no picture.
    model : str
        The vision-language model.
    tokens : str
        Budget as the paper tabulates it; ``kept:N`` and ``N%`` as the paper counts them.
    task, metric : str
        Benchmark and what is measured on it.
    value : str
        The number with the decimals it was printed with.
    protocol : str
        How the benchmark was scored; two numbers compare only if it is the same.
    source, note : str
        Citation; corrections and doubts, several separated by ``"; "``.
    """

    paper: str
    table: str
    method: str
    model: str
    tokens: str
    task: str
    metric: str
    value: str
    protocol: str
    source: str
    note: str

    @property
    def notes(self) -> list[str]:
        """The notes, one by one."""
        return self.note.split("; ") if self.note else []


@dataclass(frozen=True)
class _Row:
    """A row of a table: its labels and the numbers that belong to it."""

    method: str
    tokens: str
    paper: str
    numbers: Sequence[Published]

    def find(self, column: Column) -> Published | None:
        """Look up the number for a column, preferably under the column's own protocol."""
        found = [
            number
            for number in self.numbers
            if number.task == column.task and column.metric in (None, number.metric)
        ]
        return min(found, key=lambda number: number.protocol != column.protocol, default=None)

    def scores(self, columns: Sequence[Column]) -> list[float] | None:
        """Values of these columns; none if one is missing or was measured another way."""
        found = [(self.find(column), column.protocol) for column in columns]
        values = [float(n.value) for n, asked in found if n is not None and n.protocol == asked]
        return values if len(values) == len(columns) else None

    def labels(self, names: Sequence[str]) -> list[str]:
        """Cells in front of the scores."""
        words = {"method": self.method, "tokens": self.tokens, "measured by": self.paper}
        return [words[name] for name in names]


def mean_of_ratios(scores: Sequence[float], full: Sequence[float]) -> float:
    """Average of a table in percent: mean over benchmarks of score / full score (spec tasks 1.1).

    Parameters
    ----------
    scores, full : sequence of float
        One entry per benchmark, same order; points enter as a ratio like percentages.
    """
    return 100 * fmean(s / f for s, f in zip(scores, full, strict=True))


def retention(scores: Sequence[float], low: Sequence[float], full: Sequence[float]) -> float:
    """VoCo's average in percent: mean of (score - low) / (full - low) (spec abstractive 2.8).

    Parameters
    ----------
    scores, low, full : sequence of float
        One entry per benchmark, same order; `low` is what is reached without visual information.
    """
    return 100 * fmean((s - b) / (f - b) for s, b, f in zip(scores, low, full, strict=True))


@lru_cache
def load_published(folder: Path | None = None) -> tuple[Published, ...]:
    """Read every published number, in the order of the files.

    Parameters
    ----------
    folder : Path, optional
        Folder of csv files; default: the numbers that come with etcbench.

    Raises
    ------
    UsageError
        If the folder has no csv files, or one has other columns.
    """
    folder = folder or results_folder("published")
    paths = sorted(folder.glob("*.csv"))
    if not paths:
        raise UsageError(f"no published numbers in {folder}; it should hold csv files")
    return tuple(number for path in paths for number in _read(path))


def published_table(name: str, folder: Path | None = None) -> Sheet:
    """Build a table from published numbers alone.

    Parameters
    ----------
    name : str
        A key of `etcbench.paper_tables.PAPER_TABLES`, e.g. ``"etc-1"``.
    folder : Path, optional
        As in `load_published`.

    Returns
    -------
    Sheet
        Its ``frame`` holds strings: scores as printed, averages with two decimals, ``"-"`` where
        nothing was published or an average would mix protocols.

    Raises
    ------
    UsageError
        If there is no such table.
    """
    if name not in PAPER_TABLES:
        raise unknown_name("table", name, PAPER_TABLES)
    table = PAPER_TABLES[name]
    rows = _rows(table, load_published(folder))
    lead = ["tokens", "method", "measured by"] if table.by_tokens else ["method", "tokens"]
    headings = [*lead, *(c.heading for c in table.columns), *(a.heading for a in table.averages)]
    cells: dict[tuple[int, int], str] = {}
    doubts: dict[tuple[int, int], list[str]] = {}
    records = []
    for at, row in enumerate(rows):
        for place, column in enumerate(table.columns, len(lead)):
            number = row.find(column)
            if number is None:
                continue
            same = number.protocol == column.protocol
            cells[at, place] = number.value if same else f"{number.value} ({number.protocol})"
            doubts[at, place] = number.notes
            records.append(_record(table, column.heading, number, same))
    marks, notes, remarks = _place(doubts, lead.index("method"))
    for place, average in enumerate(table.averages, len(lead) + len(table.columns)):
        for at, number in _averages(table, rows, average).items():
            cells[at, place] = number.value
            records.append(_record(table, average.heading, number, True))
            if number.note:
                if number.note not in notes:
                    notes.append(number.note)
                marks[at, place] = [notes.index(number.note) + 1]
    differing = any(not record["comparable"] for record in records)
    width = range(len(lead), len(headings))
    body = [
        [*row.labels(lead), *(cells.get((at, place), MISSING) for place in width)]
        for at, row in enumerate(rows)
    ]
    return Sheet(
        name=name,
        caption=table.caption,
        frame=pd.DataFrame(body, columns=headings, dtype=object),
        marks=marks,
        notes=notes,
        remarks=[*table.remarks, *remarks, *([_OTHER] if differing else [])],
        records=records,
        labels=len(lead),
    )


def show_published(name: str | None, form: str | None, *, alone: bool) -> None:
    """Print a table to stdout; without a format drawn for a terminal, as Markdown elsewhere.

    Parameters
    ----------
    name, form : str, optional
        As in `published_table` and `render_sheet`.
    alone : bool
        That only published numbers were asked for; measured ones have no place in these tables.

    Raises
    ------
    UsageError
        If the name is missing or unknown, or measured numbers were asked for too.
    """
    if name is None or not alone:
        raise UsageError(
            "published numbers are shown by --table NAME --published-only, without runs; "
            f"NAME is one of {', '.join(PAPER_TABLES)}"
        )
    sheet = published_table(name)
    if form is not None:
        print(render_sheet(sheet, form))
        return
    headings, *rows = sheet.marked()
    show(headings, rows, [sheet.caption, *sheet.lines()])


def _read(path: Path) -> list[Published]:
    expected = [field.name for field in fields(Published)]
    with path.open(encoding="utf-8", newline="") as file:
        header, *lines = csv.reader(file)
    if header != expected:
        raise UsageError(f"{path}: columns are {', '.join(header)}; wanted {', '.join(expected)}")
    for at, line in enumerate(lines, 2):
        if len(line) != len(expected):
            raise UsageError(f"{path} line {at}: {len(line)} fields instead of {len(expected)}")
    return [Published(*line) for line in lines]


def _rows(table: PaperTable, numbers: Iterable[Published]) -> list[_Row]:
    """Numbers of a table by row, rows in the order of the files or by falling budget."""
    grouped: dict[tuple[str, str, str], list[Published]] = {}
    for number in numbers:
        if any(_within(number, part) for part in table.parts):
            grouped.setdefault((number.method, number.tokens, number.paper), []).append(number)
    rows = [_Row(*key, found) for key, found in grouped.items()]
    # sorting is stable: rows of one budget stay in the order of the files
    return sorted(rows, key=lambda row: -float(row.tokens)) if table.by_tokens else rows


def _within(number: Published, part: Part) -> bool:
    return (
        number.table == part.table
        and part.paper in (None, number.paper)
        and (not part.tokens or number.tokens in part.tokens)
    )


def _averages(table: PaperTable, rows: Sequence[_Row], average: Average) -> dict[int, Published]:
    """Averages by row position; the note says where the paper prints something else."""
    columns = [c for c in table.columns if not average.over or c.heading in average.over]
    full = _reference(table, rows, "full", columns)
    low = _reference(table, rows, average.low, columns) if average.low else None
    printed = {
        at: number
        for at, row in enumerate(rows)
        for number in row.numbers
        if number.task == "average" and number.metric == average.metric
    }
    found = {}
    for at, row in enumerate(rows):
        scores = row.scores(columns)
        if scores is None:
            continue
        value = mean_of_ratios(scores, full) if low is None else retention(scores, low, full)
        found[at] = replace(
            row.numbers[0],
            task="average",
            metric=average.metric,
            value=f"{value:.2f}",
            protocol=average.protocol,
            source="computed from the printed scores",
            note=_about(value, printed.get(at)) if printed else "",
        )
    return found


def _reference(
    table: PaperTable, rows: Sequence[_Row], method: str, columns: Sequence[Column]
) -> list[float]:
    """Scores of the one row that others are averaged against."""
    found = [row.scores(columns) for row in rows if row.method == method]
    if len(found) != 1 or found[0] is None:
        raise UsageError(f"table {table.name}: needs one row {method!r} with every score")
    return found[0]


def _about(value: float, printed: Published | None) -> str:
    """Compare an average with the printed one, at the decimals it was printed with."""
    if printed is None:
        return _UNPRINTED
    decimals = len(printed.value.partition(".")[2])
    if f"{value:.{decimals}f}" == printed.value:
        return ""
    return ", ".join([f"the paper prints {printed.value}", *printed.notes])


def _record(
    table: PaperTable, heading: str, number: Published, comparable: bool
) -> dict[str, str | bool]:
    where = {"name": table.name, "column": heading}
    return {**where, **asdict(number), "comparable": comparable}


def _place(
    doubts: Mapping[tuple[int, int], Sequence[str]], label: int
) -> tuple[dict[tuple[int, int], list[int]], list[str], list[str]]:
    """Find the place for each note where it says most with fewest marks, and number them.

    A note on every cell is a remark about the table, one on whole columns belongs to their
    headings, one on whole rows to the rows' labels (column `label`), any other to its cells.
    """
    holders: dict[str, set[tuple[int, int]]] = {}
    for place, notes in doubts.items():
        for note in notes:
            holders.setdefault(note, set()).add(place)
    remarks, places = [], {}
    for note, cells in holders.items():
        columns, rows = {c for _, c in cells}, {r for r, _ in cells}
        if cells == set(doubts):
            remarks.append(note[0].upper() + note[1:] + ".")
        elif len(rows) > 1 and cells == {(r, c) for r, c in doubts if c in columns}:
            places[note] = {(HEADING, column) for column in columns}
        elif len(columns) > 1 and cells == {(r, c) for r, c in doubts if r in rows}:
            places[note] = {(row, label) for row in rows}
        else:
            places[note] = cells
    ordered = sorted(places, key=lambda note: min(places[note]))
    marks: dict[tuple[int, int], list[int]] = {}
    for number, note in enumerate(ordered, 1):
        for place in places[note]:
            marks.setdefault(place, []).append(number)
    return marks, ordered, remarks
