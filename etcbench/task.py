"""The contract of a benchmark: rows become samples, samples become prompts, answers become a score.

A benchmark is one file in ``tasks/`` that subclasses `Task`. Scoring needs no GPU, no network and
no language model as a judge; it drops nothing, guesses nothing and does not depend on the order of
the samples (spec tasks 2).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from etcbench.doc import Doc, Docs, Picture, Row, UnreadableImage, pictures_in
from etcbench.errors import UsageError, unknown_name
from etcbench.scoring.statistics import (
    Floats,
    Interval,
    PairedDifference,
    bootstrap,
    mean_percent,
    paired_difference,
    wilson,
)

__all__ = [
    "Doc",
    "Docs",
    "HubSource",
    "Parsed",
    "Picture",
    "Report",
    "Scored",
    "Task",
    "UnreadableImage",
    "compare_runs",
]

Pairs = Iterable[tuple[Doc, str | None]]
Breakdown = dict[str, dict[str, dict[str, float]]]


@dataclass(frozen=True)
class Parsed:
    """What a response was read as; ``unparsed`` when it names no answer."""

    value: Any
    status: Literal["ok", "unparsed"] = "ok"


UNPARSED = Parsed(None, "unparsed")


@dataclass(frozen=True)
class Scored:
    """One sample with its response (None if it errored), reading and correctness in 0..1."""

    doc: Doc
    response: str | None
    parsed: Parsed
    outcome: float


@dataclass(frozen=True)
class HubSource:
    """Where a benchmark lives on the hub.

    Attributes
    ----------
    ids : tuple of str
        The current id first, then the namespaces it had before.
    config : str, optional
        Configuration of the dataset.
    split : str
        Split that is scored by default.
    """

    ids: tuple[str, ...]
    config: str | None = None
    split: str = "test"


@dataclass(frozen=True)
class Report:
    """A score.

    Attributes
    ----------
    task, mode : str
        Benchmark and rule set.
    headline : dict of str to float
        The first entry is THE headline.
    unit : str
        ``"%"``, ``"points"`` or ``"raw"``.
    breakdown : dict
        Kind to value to figures, e.g. ``breakdown["subtask"]["count"]["acc"]``.
    n, n_unparsed, n_error : int
        Samples; those whose response named no answer (errors included); those without a response.
    interval : Interval
        95 % interval of the headline.
    """

    task: str
    mode: str
    headline: dict[str, float]
    unit: str
    breakdown: Breakdown
    n: int
    n_unparsed: int
    n_error: int
    interval: Interval
    notes: tuple[str, ...] = field(default=())

    @property
    def value(self) -> float:
        """THE headline."""
        return next(iter(self.headline.values()))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; the same score gives the same dictionary."""
        return {**asdict(self), "notes": list(self.notes)}


class Task:
    """Base class of a benchmark; a subclass states its data and overrides what differs.

    Class attributes
    ----------------
    name : str
        File name of the module.
    stem : str
        Name of the local parquet file, where several benchmarks read the same rows.
    columns : tuple of str
        Hub columns that a row must have.
    source : HubSource
        Where the rows come from.
    explode : str or None
        Column with a list of which each entry is a sample of its own.
    styles, modes : tuple of str
        Prompt styles and rule sets, the default first.
    variants : mapping of str to options
        ``mmbench_cn`` is ``mmbench`` with ``variants["cn"]``.
    max_new_tokens : int
        Length limit of an answer.
    unit : str
        Unit of the headline.
    metric : str
        Name of the headline.
    hit_rate : bool
        Whether the headline is the mean outcome in percent.
    scores_by_size : bool
        Whether scoring needs the size of the picture.
    """

    name: str
    stem: str = ""
    columns: ClassVar[tuple[str, ...]]
    source: HubSource
    explode: ClassVar[str | None] = None
    styles: ClassVar[tuple[str, ...]] = ("llava", "lmms", "official")
    modes: ClassVar[tuple[str, ...]] = ("official",)
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    max_new_tokens: int = 128
    unit: ClassVar[str] = "%"
    metric: ClassVar[str] = "accuracy"
    hit_rate: ClassVar[bool] = True
    scores_by_size: ClassVar[bool] = False

    # rows to samples

    def doc(self, row: Row, index: int) -> Doc:
        """Build a sample from a row in the hub's columns; the picture may be missing."""
        raise NotImplementedError

    def choose(self, docs: Docs) -> Docs:
        """Narrow the rows to the samples this benchmark is scored on; all of them by default."""
        return docs

    def open_hub(self, split: str, revision: str | None) -> tuple[Any, str]:
        """Load the rows from the hub: a table and its ``id@revision``."""
        from etcbench.loading import open_hub

        return open_hub(self.source, split, revision)

    def from_official(self, record: Row, path: Path) -> Row | None:
        """Rename the fields of the benchmark's own gold file to the hub's columns.

        Parameters
        ----------
        record : mapping
            One entry of the file; the key of a dictionary of entries is in ``id``.
        path : Path
            The file, where its name says something.

        Returns
        -------
        mapping or None
            A row for `doc`; None for an entry that is not scored.
        """
        return record

    def key(self, text: str) -> str:
        """Bring a question id of a predictions file into the form of the samples' ids."""
        return text

    # samples to prompts

    def prompt(self, doc: Doc, style: str | None = None) -> str:
        """User text after the image line, without the model's conversation template.

        Raises
        ------
        UsageError
            If the benchmark has no such style.
        """
        style = self._known("prompt style", style, self.styles)
        return self.render(doc, style)

    def render(self, doc: Doc, style: str) -> str:
        """Write the prompt in one of ``styles``."""
        raise NotImplementedError

    # answers to scores

    def parse(self, response: str, doc: Doc, mode: str) -> Parsed:
        """Read a response by the rules of `mode`; never raises."""
        raise NotImplementedError

    def outcome(self, parsed: Parsed, doc: Doc, mode: str) -> float:
        """Correctness of one sample in 0..1; equality with the gold answer by default."""
        return float(parsed.value is not None and parsed.value == doc.gold)

    def score_one(self, doc: Doc, response: str | None, mode: str | None = None) -> Scored:
        """Read and mark one response; None is an error and counts as wrong."""
        mode = self.mode(mode)
        if response is None:
            return Scored(doc, None, UNPARSED, 0.0)
        parsed = self.parse(response, doc, mode)
        return Scored(doc, response, parsed, self.outcome(parsed, doc, mode))

    def score(self, pairs: Pairs, mode: str | None = None) -> Report:
        """Score a run.

        Parameters
        ----------
        pairs : iterable of (Doc, str or None)
            Every sample once, in any order; None where no response was produced.
        mode : str, optional
            Rule set, one of ``modes``.
        """
        mode = self.mode(mode)
        rows = self._scored(pairs, mode)
        if not rows:
            raise UsageError(f"{self.name}: there is nothing to score")
        return Report(
            task=self.name,
            mode=mode,
            headline=self.headline(rows, mode),
            unit=self.unit,
            breakdown=self.breakdown(rows, mode),
            n=len(rows),
            n_unparsed=sum(row.parsed.status == "unparsed" for row in rows),
            n_error=sum(row.response is None for row in rows),
            interval=self.interval(rows, mode),
            notes=self.notes(rows, mode),
        )

    def headline(self, rows: Sequence[Scored], mode: str) -> dict[str, float]:
        """Named figures over all samples, THE headline first; the mean outcome by default."""
        return {self.metric: percent(rows)}

    def breakdown(self, rows: Sequence[Scored], mode: str) -> Breakdown:
        """Figures per value of each category; mean outcome and n by default."""
        return {
            kind: {
                value: {self.metric: percent(part), "n": len(part)} for value, part in parts.items()
            }
            for kind, parts in by_category(rows).items()
        }

    def notes(self, rows: Sequence[Scored], mode: str) -> tuple[str, ...]:
        """Remarks that belong beside the score."""
        return ()

    # statistics

    def table(self, rows: Sequence[Scored], mode: str) -> Floats:
        """Contributions of each sample to the headline, [n, k]; see ``scoring.statistics``."""
        return np.array([(row.outcome, 1.0) for row in rows])

    def statistic(self, sums: Floats) -> Floats:
        """Headline from the column sums of `table`: [b, k] to [b]."""
        return mean_percent(sums)

    def strata(self, rows: Sequence[Scored]) -> list[str] | None:
        """Parts whose size the bootstrap keeps; one part by default."""
        return None

    def interval(self, rows: Sequence[Scored], mode: str) -> Interval:
        """Wilson for a hit rate over independent samples, bootstrap by group otherwise."""
        independent = len({row.doc.group for row in rows}) == len(rows)
        hits = all(row.outcome in (0.0, 1.0) for row in rows)
        if independent and hits and self.hit_rate:
            return wilson(sum(row.outcome for row in rows), len(rows))
        return bootstrap(
            self.table(rows, mode), _groups(rows), self.statistic, strata=self.strata(rows)
        )

    # helpers of subclasses

    def mode(self, mode: str | None) -> str:
        """Resolve a rule set; the first of ``modes`` if none is named."""
        return self._known("mode", mode, self.modes)

    def pictures(self, row: Row) -> tuple[Picture, ...]:
        """Take the pictures out of a row's image column, if it has one."""
        return pictures_in(row.get("image"), row.get("folder"))

    def _known(self, kind: str, name: str | None, known: Sequence[str]) -> str:
        if name is None:
            return known[0]
        if name not in known:
            raise unknown_name(f"{kind} of {self.name}", name, known)
        return name

    def _scored(self, pairs: Pairs, mode: str) -> list[Scored]:
        rows = [self.score_one(doc, response, mode) for doc, response in pairs]
        return sorted(rows, key=lambda row: (row.doc.group, row.doc.id, row.response or ""))


def compare_runs(
    task: Task, first: Pairs, second: Pairs, mode: str | None = None
) -> PairedDifference:
    """Difference of THE headline between two runs on the same samples, with its interval.

    Raises
    ------
    UsageError
        If the two runs did not answer the same samples.
    """
    mode = task.mode(mode)
    a, b = task._scored(first, mode), task._scored(second, mode)
    if [row.doc.id for row in a] != [row.doc.id for row in b]:
        shared = len({row.doc.id for row in a} & {row.doc.id for row in b})
        raise UsageError(
            f"{task.name}: the runs hold {len(a)} and {len(b)} samples of which {shared} are "
            "shared; compare runs on the same data and limit"
        )
    return paired_difference(
        task.table(a, mode), task.table(b, mode), _groups(a), task.statistic, task.strata(a)
    )


def percent(rows: Sequence[Scored]) -> float:
    """Mean outcome in percent; 0 for no rows. Exact summation: order does not matter."""
    return 100 * math.fsum(row.outcome for row in rows) / len(rows) if rows else 0.0


def by_category(rows: Sequence[Scored]) -> dict[str, dict[str, list[Scored]]]:
    """Split rows by kind of category, then by value, both sorted."""
    parts: dict[str, dict[str, list[Scored]]] = {}
    for row in rows:
        for kind, value in row.doc.categories.items():
            parts.setdefault(kind, {}).setdefault(value, []).append(row)
    return {kind: dict(sorted(parts[kind].items())) for kind in sorted(parts)}


def _groups(rows: Sequence[Scored]) -> list[str]:
    return [row.doc.group for row in rows]
