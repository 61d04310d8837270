"""Published numbers, as printed.

The numbers are csv files in ``results/published/`` of the repository; an installed package carries
a copy. Each says under which protocol it was measured, as far as that is known or can be inferred.
A cell measured under another protocol than its column asks for is shown with its own protocol
and never enters an average.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

from etcbench.errors import UsageError
from etcbench.recorded import results_folder


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
