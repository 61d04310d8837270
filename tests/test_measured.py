"""Measured runs in the tables of the papers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from test_paired import runs, value

from etcbench.errors import UsageError
from etcbench.measured import label_of, measured_numbers
from etcbench.paper_sheets import measured_tables, published_table
from etcbench.store import RunDirectory
from etcbench.tables import Sheet, render_sheet

SCORES = {"mmbench": 64.0, "mme": 1800.0, "seedbench": 60.0, "scienceqa": 70.0, "vqav2": 77.0}
KEYS = {"mmbench": "circular", "mme": "total", "seedbench": "all", "scienceqa": "img"}


def fake(
    method: str,
    tokens: str | None,
    factor: float,
    model: str = "llava-hf/llava-1.5-7b-hf",
    **more: Any,
) -> list[RunDirectory]:
    """Runs of a real model on all five benchmarks of the paper's first table."""
    (pattern,) = runs("pope", "full")
    made = []
    for task, score in SCORES.items():
        run = copy.deepcopy(pattern)
        config = run.manifest["config"]
        config.update(method=method, tokens=tokens, task=task, options={}, weights={}, **more)
        config["model"] = {"name": model}
        assert run.summary is not None
        key = KEYS.get(task, "accuracy")
        run.summary.update(headline={key: score * factor}, micro=None, unit="%")
        run.summary["interval"] = {"low": score * factor - 1, "high": score * factor + 1}
        run.path = Path(f"{model}/{method}-{tokens}-{more.get('seed', 0)}/{task}")
        made.append(run)
    return made


def rows(sheet: Sheet, **wanted: str) -> list[dict[str, str]]:
    found = sheet.frame.to_dict("records")
    return [row for row in found if all(row[key] == cell for key, cell in wanted.items())]


def table(runs: Sequence[RunDirectory], name: str = "etc-1") -> Sheet:
    (sheet,) = measured_tables(name, measured_numbers(runs))
    return sheet


def test_the_paper_s_model_stands_beside_the_published_rows() -> None:
    sheet = table([*fake("full", None, 1), *fake("etc", "1", 0.9)])
    published, measured = rows(sheet, method="etc", tokens="1")
    assert (published["measured by"], measured["measured by"]) == ("etc", "measured")
    assert (
        published["SEED (all)"]
        == rows(published_table("etc-1"), method="etc", tokens="1")[0]["SEED (all)"]
    )
    assert measured["SEED (all)"] == "54.0 [53.0, 55.0]"
    # the validation split is not the evaluation server
    assert measured["VQAv2 (test-dev)"].endswith("(val)") and measured["avg %"] == "-"


def test_a_benchmark_without_a_gap_has_no_share_of_it() -> None:
    made = [*fake("full", None, 1, "a/b"), *fake("etc", "1", 0.9, "a/b")]
    made += fake("blind", None, 0.5, "a/b")
    for run in made:
        if run.manifest["config"]["task"] == "scienceqa":
            assert run.summary is not None
            run.summary["headline"] = {"img": 40.0}
    sheet = table(made)
    assert {row["retention %"] for row in rows(sheet)} == {"-"}
    assert float(rows(sheet, method="etc")[0]["avg %"]) == pytest.approx(92, abs=0.05)
    (said,) = (line for line in sheet.remarks if "No retention" in line)
    assert said == "No retention %: on SQA (img) the full model is not above blind."


def test_an_ablation_shows_what_it_varied_and_nothing_else() -> None:
    made = [*fake("full", None, 1, "a/b"), *fake("voco", "1", 0.8, "a/b")]
    for at, options in enumerate(
        ({}, {"alpha": 0.2}, {"lambda_vid": 0}, {"lambda_vid": 0.01}, {"auxiliary": "mse"})
    ):
        runs_of = fake("etc", "1", 0.9, "a/b", seed=at)
        for run in runs_of:
            run.manifest["config"]["options"] = options
        made += runs_of
    shown = {name: set(table(made, name).frame["method"]) for name in ("etc-5", "etc-6", "etc-7")}
    assert shown["etc-5"] == {"full", "etc", "etc[alpha=0.2]"}
    assert shown["etc-6"] == {"full", "etc", "etc[lambda_vid=0]", "etc[lambda_vid=0.01]"}
    assert shown["etc-7"] == {"full", "etc", "etc[lambda_vid=0]", "etc[auxiliary=mse]"}


def test_another_model_has_a_table_of_its_own_with_averages_of_its_own() -> None:
    made = [
        *fake("full", None, 1, "a/b"),
        *fake("etc", "1", 0.9, "a/b"),
        *fake("blind", None, 0.5, "a/b"),
    ]
    sheet = table(made)
    assert "a/b, in the shape of" in sheet.caption
    (etc,) = rows(sheet, method="etc")
    assert float(etc["avg %"]) == pytest.approx(90, abs=0.05)
    assert float(etc["retention %"]) == pytest.approx(80, abs=0.1)
    assert "VQAv2 (val)" in sheet.frame.columns
    assert not {record["paper"] for record in sheet.records} - {"measured"}


def test_without_the_full_model_nothing_is_averaged() -> None:
    (etc,) = rows(table(fake("etc", "1", 0.9, "a/b")), method="etc")
    assert etc["avg %"] == etc["retention %"] == "-"


def test_seeds_are_averaged_with_their_spread() -> None:
    made = [
        run for seed in range(3) for run in fake("voco", "1", 0.8 + seed / 10, "a/b", seed=seed)
    ]
    (voco,) = rows(table(made), method="voco")
    assert voco["MMBench (circular)"] == "57.6 ± 6.4"


def test_options_other_than_the_defaults_are_part_of_the_name() -> None:
    made = fake("etc", "1", 0.9, "a/b")
    for run in made:
        run.manifest["config"]["options"] = {"alpha": 0.2}
    assert {number.method for number in measured_numbers(made)} == {"etc[alpha=0.2]"}


@pytest.mark.parametrize(
    ("model", "label"),
    [
        ("micro-llava", "explainc"),
        ("micro-qwen3vl", "explainc"),
        ("llava-hf/llava-1.5-7b-hf", "explainc[signs=both]"),
    ],
)
def test_what_comes_with_an_embedded_model_is_named_alike_on_both(model: str, label: str) -> None:
    config = {"method": "explainc", "options": {"signs": "both"}, "weights": {}}
    assert label_of({**config, "model": {"name": model}}) == label


def test_micro_runs_say_so_and_their_difference_is_paired() -> None:
    made = runs("pope", "full", "voco-1")
    (sheet,) = measured_tables("voco", measured_numbers(made, "full"), "full")
    (voco,) = rows(sheet, method="voco")
    difference = value(made[1]) - value(made[0])
    assert f"; {difference:+.1f} [" in voco["POPE (F1)"]
    assert any(line.startswith("Micro figures") for line in sheet.lines())
    for form in ("md", "latex", "html", "csv", "json"):
        assert voco["POPE (F1)"].split(" ")[0] in render_sheet(sheet, form)


def test_an_unfinished_run_is_refused_and_other_tasks_are_named() -> None:
    made = fake("etc", "1", 0.9)
    made[0].summary = None
    with pytest.raises(UsageError, match="missing samples"):
        measured_numbers(made)
    with pytest.raises(UsageError, match="none of the runs"):
        measured_tables("etc-1", measured_numbers(runs("pope", "full")))
