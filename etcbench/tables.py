"""A finished table of strings with numbered notes, and the formats it can be written in.

Markdown, LaTeX and HTML show the table; csv and json give one record per figure, because a wide
table cannot say under which protocol each of its cells was measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from etcbench.errors import UsageError
from etcbench.figures import csv_of

Style = Callable[[str], str]

HEADING = -1  # row index of a mark that belongs to a column's heading

_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        **{character: f"\\{character}" for character in "&%$#_{}"},
    }
)
_STYLE = (
    "body{font-family:sans-serif;margin:2em}table{border-collapse:collapse}"
    "th,td{padding:.25em .8em;text-align:right}"
    "thead{border-top:2px solid;border-bottom:1px solid}tbody{border-bottom:2px solid}"
)


@dataclass(frozen=True)
class Sheet:
    """A table that is ready to be written.

    Attributes
    ----------
    name : str
        Short name, e.g. ``"etc-1"``.
    caption : str
        One line that says what the table shows.
    frame : pandas.DataFrame
        Cells as strings, without marks.
    marks : mapping of (int, int) to sequence of int
        Numbers of the notes that belong to a cell, by row and column position; row `HEADING` is
        the heading.
    notes : sequence of str
        The numbered notes, ``notes[0]`` is note 1.
    remarks : sequence of str
        Lines about the table as a whole.
    records : sequence of dict
        One flat record per figure, for machines.
    labels : int
        How many columns at the left are words, not figures.
    """

    name: str
    caption: str
    frame: pd.DataFrame
    marks: Mapping[tuple[int, int], Sequence[int]]
    notes: Sequence[str]
    remarks: Sequence[str]
    records: Sequence[Mapping[str, Any]]
    labels: int = 1

    def marked(self, text: Style = str, mark: Style = " [{}]".format) -> list[list[str]]:
        """Headings and rows with their marks.

        Parameters
        ----------
        text, mark : callable
            How a cell and the numbers of its notes are written.
        """
        cells = [list(self.frame.columns), *self.frame.to_numpy().tolist()]
        table = [[text(cell) for cell in row] for row in cells]
        for (row, column), numbers in self.marks.items():
            table[row - HEADING][column] += mark(",".join(map(str, numbers)))
        return table

    def lines(self) -> list[str]:
        """Remarks and notes, one line each, the notes with their numbers."""
        return [*self.remarks, *(f"[{n}] {note}" for n, note in enumerate(self.notes, 1))]


def render_sheet(sheet: Sheet, form: str) -> str:
    """Write a table as ``"md"``, ``"csv"``, ``"latex"``, ``"html"`` or ``"json"``.

    Raises
    ------
    UsageError
        If there is no such format.
    """
    if form not in FORMATS:
        raise UsageError(f"--format {form!r} is not one of {', '.join(FORMATS)}")
    return FORMATS[form](sheet)


def _markdown(sheet: Sheet) -> str:
    from tabulate import tabulate

    headings, *rows = sheet.marked(lambda cell: cell.replace("|", r"\|"))
    align = [*["left"] * sheet.labels, *["right"] * (len(headings) - sheet.labels)]
    body = tabulate(rows, headings, tablefmt="pipe", disable_numparse=True, colalign=align)
    return "\n\n".join([f"**{sheet.caption}**", body, *sheet.lines()])


def _csv(sheet: Sheet) -> str:
    return csv_of(sheet.records)


def _json(sheet: Sheet) -> str:
    content = {
        "table": sheet.name,
        "caption": sheet.caption,
        "remarks": list(sheet.remarks),
        "records": list(sheet.records),
    }
    return json.dumps(content, indent=2, ensure_ascii=False)


def _latex(sheet: Sheet) -> str:
    """Write a float for the booktabs package, its notes below the tabular."""
    superscript = r"\textsuperscript{{{}}}".format
    headings, *rows = [" & ".join(cells) + r" \\" for cells in sheet.marked(_tex, superscript)]
    notes = [f"{superscript(n)} {_tex(note)}" for n, note in enumerate(sheet.notes, 1)]
    below = [rf"\par {line}" for line in [*map(_tex, sheet.remarks), *notes]]
    columns = "l" * sheet.labels + "r" * (sheet.frame.shape[1] - sheet.labels)
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_tex(sheet.caption)}}}",
            rf"\label{{tab:{sheet.name}}}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            headings,
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            *([r"\par\raggedright\footnotesize", *below] if below else []),
            r"\end{table}",
        ]
    )


def _tex(text: str) -> str:
    return text.translate(_LATEX)


def _html(sheet: Sheet) -> str:
    from html import escape

    headings, *rows = sheet.marked()
    title = escape(sheet.caption)
    words = ",".join(f"{cell}:nth-child(-n+{sheet.labels})" for cell in ("th", "td"))
    return "\n".join(
        [
            "<!doctype html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
            f"<style>{_STYLE}{words}{{text-align:left}}</style></head><body>",
            f"<h1>{title}</h1>",
            pd.DataFrame(rows, columns=headings).to_html(index=False, border=0, escape=True),
            *(f"<p>{escape(line)}</p>" for line in sheet.lines()),
            "</body></html>",
        ]
    )


FORMATS: dict[str, Callable[[Sheet], str]] = {
    "md": _markdown,
    "csv": _csv,
    "latex": _latex,
    "html": _html,
    "json": _json,
}
