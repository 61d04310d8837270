"""How scores are printed: units, decimals, the rows of one score."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from etcbench.task import Report

UNITS = {"%": " %", "points": " points", "raw": ""}


def score_rows(report: Report) -> list[list[str]]:
    """Rows of one score: the headline with its interval, then the figures of every part.

    Parameters
    ----------
    report : Report
        From `score_file` or `Task.score`.
    """
    unit = UNITS[report.unit]
    digits = digits_of(report.unit)
    interval = f"[{report.interval.low:.{digits}f}, {report.interval.high:.{digits}f}]"
    rows = []
    for number, (name, value) in enumerate(report.headline.items()):
        shown = interval if number == 0 else ""
        rows.append([f"{report.task} {name}{unit}", f"{value:.{digits}f}", shown, str(report.n)])
    for kind, parts in report.breakdown.items():
        for part, figures in parts.items():
            count = figures.get("n")
            for name, value in figures.items():
                if name != "n":
                    n = "" if count is None else f"{count:g}"
                    rows.append([f"{kind} {part}: {name}", f"{value:.{digits}f}", "", n])
    rows.append(["answers that could not be read", str(report.n_unparsed), "", str(report.n)])
    return rows


def digits_of(unit: str) -> int:
    """Decimals to print: fractions and CIDEr need more than percentages."""
    return 3 if unit == "raw" else 1
