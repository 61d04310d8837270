"""The tables of the papers, filled with published numbers, measured ones, or both side by side.

A cell measured under another protocol than its column asks for is shown with its own protocol
and never enters an average. Measured rows stand next to published ones only for the same model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from statistics import fmean

import pandas as pd

from etcbench.budget import NOMINAL
from etcbench.errors import UsageError, unknown_name
from etcbench.measured import MEASURED, Measured, remarks_on
from etcbench.paper_tables import PAPER_TABLES, Average, Column, PaperTable, Part
from etcbench.published import Published, load_published
from etcbench.tables import HEADING, Sheet

MISSING = "-"
_OTHER = (
    "In parentheses: measured under another protocol than the column; never averaged or ranked."
)
_UNPRINTED = "computed here: the paper prints none"


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
    table = _table(name)
    return _sheet(table, _rows(table, load_published(folder)), False)


def measured_tables(
    name: str, numbers: Sequence[Measured], baseline: str | None = None
) -> list[Sheet]:
    """Build a table for each model that was measured.

    For the model of the paper, published rows stand beside measured ones of the same method and
    budget. For any other model, the embedded ones above all, the table has the same shape and no
    published number in it.

    Parameters
    ----------
    name : str
        A key of `etcbench.paper_tables.PAPER_TABLES`.
    numbers : sequence of Measured
        From `measured_numbers`.
    baseline : str, optional
        What their differences are to.

    Raises
    ------
    UsageError
        If there is no such table, or nothing of it was measured.
    """
    table = _table(name)
    tasks = {column.task for column in table.columns}
    wanted = [n for n in numbers if n.task in tasks and table.takes(n.method)]
    if not wanted:
        raise UsageError(
            f"table {name} shows {', '.join(sorted(tasks))}; none of the runs is of those"
        )
    published = _rows(table, load_published())
    sheets = []
    for model in dict.fromkeys(number.model for number in wanted):
        mine = [number for number in wanted if number.model == model]
        measured = _grouped(mine)
        together = [row for row in published if row.numbers[0].model == model]
        remarks = remarks_on(mine, baseline)
        if together:
            rows = _side_by_side(table, together, measured)
            shown = replace(table, remarks=(*table.remarks, *remarks))
        else:
            rows = sorted(measured, key=_falling)
            columns = {c.heading: _own_protocol(c, mine) for c in table.columns}
            shown = replace(
                table,
                caption=f"{model}, in the shape of {table.caption}",
                columns=tuple(columns.values()),
                averages=tuple(
                    replace(average, over=tuple(columns[name].heading for name in average.over))
                    for average in table.averages
                ),
                remarks=tuple(remarks),
            )
        sheets.append(_sheet(shown, rows, bool(together)))
    return sheets


def _table(name: str) -> PaperTable:
    if name not in PAPER_TABLES:
        raise unknown_name("table", name, PAPER_TABLES)
    return PAPER_TABLES[name]


def _own_protocol(column: Column, numbers: Sequence[Measured]) -> Column:
    """Let a column without published numbers ask for what was measured, and say so."""
    found = [n.protocol for n in numbers if n.task == column.task]
    if not found or column.protocol in found:
        return column
    return replace(
        column, protocol=found[0], heading=f"{column.heading.split(' (')[0]} ({found[0]})"
    )


def _sheet(table: PaperTable, rows: Sequence[_Row], mixed: bool) -> Sheet:
    """Write rows of numbers as a table; ``mixed`` names who measured each row."""
    lead = ["tokens", "method"] if table.by_tokens else ["method", "tokens"]
    lead += ["measured by"] if table.by_tokens or mixed else []
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
            text = number.text if isinstance(number, Measured) else number.value
            cells[at, place] = text if same else f"{text} ({number.protocol})"
            doubts[at, place] = number.notes
            records.append(_record(table, column.heading, number, same))
    marks, notes, remarks = _place(doubts, lead.index("method"))
    for place, average in enumerate(table.averages, len(lead) + len(table.columns)):
        if level := _level(table, rows, average):
            remarks.append(
                f"No {average.heading}: on {level} the full model is not above "
                + ("blind." if average.low else "0.")
            )
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
        name=table.name,
        caption=table.caption,
        frame=pd.DataFrame(body, columns=headings, dtype=object),
        marks=marks,
        notes=notes,
        remarks=[*table.remarks, *remarks, *([_OTHER] if differing else [])],
        records=records,
        labels=len(lead),
    )


def _rows(table: PaperTable, numbers: Iterable[Published]) -> list[_Row]:
    """Choose the published numbers of a table; one row per method, budget and who measured it."""
    rows = _grouped(n for n in numbers if any(_within(n, part) for part in table.parts))
    # sorting is stable: rows of one budget stay in the order of the files
    return sorted(rows, key=_falling) if table.by_tokens else rows


def _grouped(numbers: Iterable[Published]) -> list[_Row]:
    grouped: dict[tuple[str, str, str], list[Published]] = {}
    for number in numbers:
        grouped.setdefault((number.method, number.tokens, number.paper), []).append(number)
    return [_Row(*key, found) for key, found in grouped.items()]


def _falling(row: _Row) -> float:
    asked = row.tokens.rpartition(":")[2]
    return -float(Fraction(asked) * (NOMINAL if "/" in asked else 1))


def _side_by_side(
    table: PaperTable, published: Sequence[_Row], measured: Sequence[_Row]
) -> list[_Row]:
    """Put each measured row behind the last published one of its method and budget."""
    rows = list(published)
    for row in measured:
        same = [
            at
            for at, other in enumerate(rows)
            if (other.method, other.tokens) == (row.method, row.tokens)
        ]
        rows.insert(same[-1] + 1 if same else len(rows), row)
    return sorted(rows, key=_falling) if table.by_tokens else rows


def _within(number: Published, part: Part) -> bool:
    return (
        number.table == part.table
        and part.paper in (None, number.paper)
        and (not part.tokens or number.tokens in part.tokens)
    )


def _averages(table: PaperTable, rows: Sequence[_Row], average: Average) -> dict[int, Published]:
    """Averages by row position; the note says where the paper prints something else.

    Published rows are averaged against the published reference, measured ones against their own.
    """
    printed = {
        at: number
        for at, row in enumerate(rows)
        for number in row.numbers
        if number.task == "average" and number.metric == average.metric
    }
    found = {}
    for measured in (False, True):
        if measured and _level(table, rows, average):
            continue
        group = {at: row for at, row in enumerate(rows) if (row.paper == MEASURED) == measured}
        for at, value in _averaged(table, group, average, measured).items():
            found[at] = replace(
                rows[at].numbers[0],
                task="average",
                metric=average.metric,
                value=f"{value:.2f}",
                protocol=average.protocol,
                source="computed from the printed scores",
                note=_about(value, printed.get(at)) if printed and not measured else "",
            )
    return found


def _averaged(
    table: PaperTable, rows: Mapping[int, _Row], average: Average, measured: bool
) -> dict[int, float]:
    """Average the rows that have every score; none where a measured reference is missing."""
    columns = _entering(table, average)
    # what papers call the lower bound is here the model that sees no picture
    lowest = "blind" if measured and average.low else average.low
    wanted = ["full", *([lowest] if lowest else [])]
    references = []
    for method in wanted if rows else ():
        scores = [row.scores(columns) for row in rows.values() if row.method == method]
        if len(scores) != 1 or scores[0] is None:
            if measured:
                return {}
            raise UsageError(f"table {table.name}: needs one row {method!r} with every score")
        references.append(scores[0])
    found = {}
    for at, row in rows.items():
        if (own := row.scores(columns)) is not None:
            full, *low = references
            found[at] = retention(own, low[0], full) if low else mean_of_ratios(own, full)
    return found


def _level(table: PaperTable, rows: Sequence[_Row], average: Average) -> str:
    """Columns on which the measured model is no better for its picture: they have no ratio."""
    low = [row for row in rows if row.paper == MEASURED and row.method == "blind"]
    full = [row for row in rows if row.paper == MEASURED and row.method == "full"]
    if len(full) != 1 or (average.low and len(low) != 1):
        return ""
    level = []
    for column in _entering(table, average):
        top = full[0].scores([column])
        floor = low[0].scores([column]) if average.low else [0.0]
        if top and floor and top[0] <= floor[0]:
            level.append(column.heading)
    return ", ".join(level)


def _entering(table: PaperTable, average: Average) -> list[Column]:
    """Columns that an average is over."""
    return [c for c in table.columns if not average.over or c.heading in average.over]


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
