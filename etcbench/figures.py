"""How scores are printed: units, decimals, the rows of one score, records for machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

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


def csv_of(records: Sequence[Mapping[str, Any]]) -> str:
    """Write flat records as csv, a column for every name that one of them has."""
    import pandas as pd

    return pd.DataFrame(records).to_csv(index=False).rstrip("\n")
