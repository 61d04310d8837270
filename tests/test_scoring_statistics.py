"""Intervals and paired differences."""

from __future__ import annotations

import numpy as np
import pytest

from etcbench.errors import UsageError
from etcbench.loading import load_task, make_task
from etcbench.scoring.statistics import (
    bootstrap,
    mean_percent,
    paired_difference,
    resampled_sums,
    wilson,
)
from etcbench.task import Doc, compare_runs


def test_wilson_known_values():
    # 8 of 10 hits: the textbook interval
    interval = wilson(8, 10)
    assert (round(interval.low, 2), round(interval.high, 2)) == (49.02, 94.33)
    assert (wilson(0, 10).low, wilson(10, 10).high) == (0, 100)
    assert (wilson(0, 0).low, wilson(0, 0).high) == (0, 100)


def table(values):
    return np.stack([np.asarray(values, float), np.ones(len(values))], 1)


def test_bootstrap_of_independent_rows_agrees_with_theory():
    values = np.random.default_rng(0).random(400) < 0.7
    interval = bootstrap(table(values), range(400), mean_percent)
    spread = 100 * np.sqrt(values.mean() * (1 - values.mean()) / 400)
    assert (interval.high - interval.low) / (2 * 1.96 * spread) == pytest.approx(1, abs=0.1)


def test_grouped_rows_widen_the_interval():
    values = np.repeat(np.random.default_rng(0).random(50) < 0.5, 8)
    alone = bootstrap(table(values), range(400), mean_percent)
    grouped = bootstrap(table(values), np.repeat(range(50), 8).tolist(), mean_percent)
    ratio = (grouped.high - grouped.low) / (alone.high - alone.low)
    assert ratio == pytest.approx(np.sqrt(8), rel=0.15)


def test_resampling_ignores_the_order_and_repeats_itself():
    values = np.random.default_rng(1).random(60).round(1)
    groups = [i // 3 for i in range(60)]
    first = resampled_sums(table(values), groups, resamples=50)
    order = np.random.default_rng(2).permutation(60)
    again = resampled_sums(table(values[order]), [groups[i] for i in order], resamples=50)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, resampled_sums(table(values), groups, resamples=50, seed=9))


def test_strata_keep_their_sizes():
    strata = ["a"] * 10 + ["b"] * 30
    both = np.array([[s == "a", s == "b"] for s in strata], float)
    sums = resampled_sums(both, range(40), strata, resamples=20)
    assert (sums == [10, 30]).all()


def test_paired_difference_is_narrower_than_two_intervals():
    rng = np.random.default_rng(0)
    first = (rng.random(500) < 0.6).astype(float)
    second = first.copy()
    second[:25] = 1
    found = paired_difference(first, second, range(500))
    assert found.difference == pytest.approx(100 * (second.mean() - first.mean()))
    assert found.interval.low > 0
    assert found.interval.high - found.interval.low < 4
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_difference(first, second[1:], range(500))


@pytest.mark.parametrize(
    "name", ["mme", "pope", "vqav2", "mmbench", "seedbench", "refcoco_caption"]
)
def test_headline_equals_the_statistic_of_its_table(name, monkeypatch):
    # METEOR starts a virtual machine for every score
    monkeypatch.setattr("etcbench.scoring.captions._has_java", lambda: False)
    loaded = load_task(name, "micro", limit=80)
    task = loaded.task
    answers = ["yes", "no", "A", "B", "dog", "2", "turtle at the top right"]
    first = [(doc, answers[i % 7]) for i, doc in enumerate(loaded.docs)]
    second = [(doc, answers[i % 5]) for i, doc in enumerate(loaded.docs)]
    for mode in task.modes:
        rows = [task.score_one(doc, text, mode) for doc, text in first]
        value = task.statistic(task.table(rows, mode).sum(0, keepdims=True))[0]
        assert value == pytest.approx(task.score(first, mode).value, abs=1e-9)
        found = compare_runs(task, first, second, mode)
        difference = task.score(second, mode).value - task.score(first, mode).value
        assert found.difference == pytest.approx(difference, abs=1e-9)
        assert found.interval.low <= found.difference + 1e-9
        assert found.difference <= found.interval.high + 1e-9


def test_runs_on_different_samples_are_not_compared():
    task = make_task("gqa")
    one, two = (Doc(str(k), str(k), (), {}, "yes") for k in (1, 2))
    with pytest.raises(UsageError, match="hold 2 and 1 samples of which 1 are shared"):
        compare_runs(task, [(one, "yes"), (two, "no")], [(one, "yes")])


def test_independent_hits_take_wilson_and_pictures_take_the_bootstrap():
    task = make_task("gqa")
    apart = [(Doc(str(k), str(k), (), {}, "yes"), "yes") for k in range(9)]
    assert task.score(apart).interval == wilson(9, 9)
    together = [(Doc(str(k), "one", (), {}, "yes"), "yes") for k in range(9)]
    assert task.score(together).interval.method.startswith("bootstrap")
