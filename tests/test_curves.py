"""Figures of score against cost."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_measured import fake

from etcbench.curves import AVERAGE, Point, draw, pareto, points, read_costs
from etcbench.errors import UsageError
from etcbench.palette import look_of
from etcbench.registry import names
from etcbench.store import RunDirectory


def comparison() -> list[RunDirectory]:
    made = [*fake("full", None, 1, "m"), *fake("blind", None, 0.5, "m")]
    for place, method in enumerate(("etc", "voco", "fastv", "visionzip", "pool")):
        for step, tokens in enumerate((1, 2, 4, 16)):
            runs = fake(method, str(tokens), 0.55 + 0.1 * step - 0.03 * place, "m")
            for run in runs:
                assert run.summary is not None
                run.summary["tokens"] = {"entering": tokens, "layer_average": tokens + place}
            made += runs
    return made


def test_every_run_is_a_point_and_averages_are_ratios_to_full() -> None:
    found = points(comparison(), "tokens")
    assert sum(point.panel == "mme" for point in found) == 22
    (etc,) = (p for p in found if (p.method, p.panel, p.cost) == ("etc", AVERAGE, 1))
    assert etc.score == pytest.approx(55)
    lagging = points(comparison(), "layer_average")
    assert {p.cost for p in lagging if p.method == "pool"} == {5, 6, 8, 20}


def test_a_benchmark_that_full_fails_has_no_ratio() -> None:
    made = comparison()
    for run in made:
        if run.manifest["config"]["task"] == "mme":
            assert run.summary is not None
            run.summary["headline"] = dict.fromkeys(run.summary["headline"], 0.0)
    (etc,) = (
        p for p in points(made, "tokens") if (p.method, p.panel, p.cost) == ("etc", AVERAGE, 1)
    )
    assert etc.score == pytest.approx(55)


def test_seeds_of_a_training_are_one_point() -> None:
    runs = [run for score in (0.4, 0.6) for run in fake("etc", "1", score, "m")]
    for run in runs:
        assert run.summary is not None
        run.summary["tokens"] = {"entering": 1, "layer_average": 1}
    alone = points(runs[: len(runs) // 2], "tokens"), points(runs[len(runs) // 2 :], "tokens")
    both = points(runs, "tokens")
    for one, two, mean in zip(*alone, both, strict=True):
        assert mean.score == pytest.approx((one.score + two.score) / 2)
        assert (mean.low, mean.high) == (min(one.low, two.low), max(one.high, two.high))


def test_budgets_that_cost_the_same_are_points_of_their_own() -> None:
    made = comparison()
    for run in made:
        assert run.summary is not None
        if run.manifest["config"]["method"] == "etc":
            run.summary["tokens"]["layer_average"] = 64
    found = [p for p in points(made, "layer_average") if (p.method, p.panel) == ("etc", "mme")]
    assert {(p.cost, p.budget) for p in found} == {(64, t) for t in ("1", "2", "4", "16")}
    assert len({p.score for p in found}) == 4


def test_costs_come_from_what_measure_printed(tmp_path: Path) -> None:
    figures = [
        {"method": "etc", "tokens": "1", "figure": "kv cache", "value": 100},
        {"method": "full", "tokens": None, "figure": "kv cache", "value": 6400},
    ]
    file = tmp_path / "costs.json"
    file.write_text(json.dumps({"figures": figures}))
    found = points(comparison(), "kv", read_costs(file))
    assert {(p.method, p.cost) for p in found if p.panel == "mme"} == {("etc", 100), ("full", 6400)}
    with pytest.raises(UsageError, match="--costs"):
        points(comparison(), "kv")
    file.write_text("[]")
    with pytest.raises(UsageError, match=r"costs\.json"):
        read_costs(file)


def test_the_front_holds_what_no_other_point_beats() -> None:
    made = [Point("a", "t", c, s, s, s) for c, s in ((1, 5), (2, 4), (2, 7), (4, 7), (8, 9))]
    assert [(p.cost, p.score) for p in pareto(made)] == [(1, 5), (2, 7), (8, 9)]


def test_two_models_do_not_share_a_figure() -> None:
    with pytest.raises(UsageError, match="one model; here are m, n"):
        points([*fake("full", None, 1, "m"), *fake("full", None, 1, "n")], "tokens")
    with pytest.raises(UsageError, match="--x 'token'"):
        points(comparison(), "token")


def test_the_same_runs_give_the_same_picture(tmp_path: Path) -> None:
    found = points(comparison(), "tokens")
    files = [tmp_path / name for name in ("a.svg", "b.svg", "a.png")]
    for file in files:
        draw(found, "tokens", [file], micro=True)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert "micro figures" in files[0].read_text()
    assert (np.asarray(Image.open(files[2]).convert("L")) < 128).any()
    with pytest.raises(UsageError, match="cannot be written"):
        draw(found, "tokens", [tmp_path / "a.jpeg2"], micro=False)


def test_no_two_methods_look_alike_even_in_grey() -> None:
    looks = {name: look_of(name) for name in names("baselines") if name not in ("full", "blind")}
    assert len({(look.marker, look.line) for look in looks.values()}) == len(looks)
    assert look_of("etc[alpha=0.2]").colour == look_of("etc").colour
