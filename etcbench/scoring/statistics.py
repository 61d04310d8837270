"""How sure a score is: Wilson and bootstrap intervals, and paired differences.

A score is described by a table of per-sample contributions and a function from their column sums
to the score, which covers means, sums over subtasks and F1 alike, and lets one resampling loop
serve them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]

RESAMPLES = 1000
SEED = 20240
_DRAWS = 1 << 20  # drawn at a time: a few tens of MB


@dataclass(frozen=True)
class Interval:
    """A confidence interval in the unit of its score, and how it was obtained."""

    low: float
    high: float
    method: str


@dataclass(frozen=True)
class PairedDifference:
    """Second run minus first run on the same samples, in the unit of the score."""

    difference: float
    interval: Interval
    n: int


def wilson(successes: float, n: int, level: float = 0.95) -> Interval:
    """Wilson score interval of a hit rate, in percent.

    Parameters
    ----------
    successes : float
        Number of hits.
    n : int
        Number of independent trials; 0 gives the whole range.
    """
    if n == 0:
        return Interval(0.0, 100.0, "wilson")
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share = successes / n
    scale = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / scale
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / scale
    # exact at the ends, where rounding would leave a trace
    low = centre - half if successes > 0 else 0.0
    high = centre + half if successes < n else 1.0
    return Interval(100 * low, 100 * high, "wilson")


def resampled_sums(
    table: Floats,
    groups: Sequence[Hashable],
    strata: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Floats:
    """Column sums of bootstrap samples drawn by group, within strata.

    Parameters
    ----------
    table : array [n, k]
        Contributions of each sample.
    groups, strata : sequence of n hashables
        Samples of a group are drawn together; strata keep their number of groups. A group that
        spans several strata counts as one group per stratum.

    Returns
    -------
    array [resamples, k]
        The result does not depend on the order of the samples.
    """
    stratum_of = [""] * len(groups) if strata is None else [str(s) for s in strata]
    labels = sorted(set(zip(stratum_of, map(str, groups), strict=True)))
    place = {label: i for i, label in enumerate(labels)}
    index = [place[s, str(g)] for s, g in zip(stratum_of, groups, strict=True)]
    per_group = np.zeros((len(labels), table.shape[1]))
    np.add.at(per_group, index, table)
    # decimals that sum exactly in any order, so that shuffled samples give the same bits
    per_group = per_group.round(9)

    generator = np.random.default_rng(seed)
    sums = np.zeros((resamples, table.shape[1]))
    bounds = [i for i, (s, _) in enumerate(labels) if i == 0 or labels[i - 1][0] != s]
    for start, stop in zip(bounds, [*bounds[1:], len(labels)], strict=True):
        size = stop - start
        values = per_group[start:stop]
        chunk = max(1, _DRAWS // size)
        for first in range(0, resamples, chunk):
            rows = min(chunk, resamples - first)
            drawn = generator.integers(size, size=(rows, size)) + size * np.arange(rows)[:, None]
            counts = np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size)
            sums[first : first + rows] += counts @ values
    return sums


def bootstrap(
    table: Floats,
    groups: Sequence[Hashable],
    statistic: Statistic,
    strata: Sequence[Hashable] | None = None,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Interval:
    """Percentile bootstrap by group with a fixed seed.

    Parameters
    ----------
    statistic : callable
        Column sums [b, k] to scores [b].
    """
    scores = statistic(resampled_sums(table, groups, strata, resamples, seed))
    low, high = np.quantile(scores, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), f"bootstrap by group, {resamples} resamples")


def paired_difference(
    first: Floats,
    second: Floats,
    groups: Sequence[Hashable],
    statistic: Statistic | None = None,
    strata: Sequence[Hashable] | None = None,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> PairedDifference:
    """Difference of two runs on the same samples, resampling both alike.

    Parameters
    ----------
    first, second : array [n] or [n, k]
        Contributions of the two runs, sample by sample in the same order. A vector is per-sample
        correctness in 0..1, scored as its mean in percent.

    Raises
    ------
    ValueError
        If the two runs do not have the same number of samples.
    """
    if first.shape != second.shape:
        raise ValueError(f"runs of {len(first)} and {len(second)} samples cannot be paired")
    if first.ndim == 1:
        ones = np.ones(len(first))
        first, second = np.stack([first, ones], 1), np.stack([second, ones], 1)
    score = statistic or mean_percent
    width = first.shape[1]
    sums = resampled_sums(np.hstack([first, second]), groups, strata, resamples, seed)
    differences = score(sums[:, width:]) - score(sums[:, :width])
    low, high = np.quantile(differences, [(1 - level) / 2, (1 + level) / 2])
    point = score(second.sum(0, keepdims=True)) - score(first.sum(0, keepdims=True))
    method = f"paired bootstrap by group, {resamples} resamples"
    return PairedDifference(float(point[0]), Interval(float(low), float(high), method), len(first))


def mean_percent(sums: Floats) -> Floats:
    """Score of a table with the columns (correctness, 1): the mean in percent."""
    return 100 * ratio(sums[:, 0], sums[:, 1])


def ratio(numerator: Floats, denominator: Floats) -> Floats:
    """Divide, with 0 where there is nothing to divide by."""
    filled = np.where(denominator == 0, 1.0, denominator)
    return np.where(denominator == 0, 0.0, numerator / filled)
