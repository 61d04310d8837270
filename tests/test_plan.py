"""A comparison as a file: run what is missing, continue, and name what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from etcbench.errors import UsageError
from etcbench.plan import RUNS, load_plan, reproduce
from etcbench.recorded import results_folder
from etcbench.store import PACKED

PLAN = """
defaults: {models: [micro-llava], tasks: [pope], limit: 4}
runs:
  - {methods: [blind]}
  - {methods: [fastv], tokens: [21, 1], tasks: [mme]}
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "plan.yaml"
    file.write_text(text)
    return file


def test_a_plan_runs_what_it_can_and_is_finished_the_second_time(tmp_path: Path) -> None:
    plan = load_plan(write(tmp_path, PLAN))
    first = reproduce(plan, tmp_path / RUNS)
    done = [outcome for outcome in first if outcome.run is not None]
    assert [str(outcome.cell) for outcome in done] == ["blind pope", "fastv 21 mme"]
    assert [outcome.cell.tokens for outcome in first if outcome.error] == ["1"]
    for outcome in done:
        assert outcome.run is not None and (outcome.run.path / PACKED).is_file()
        assert outcome.run.path.is_relative_to(tmp_path / "runs" / "micro-llava")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    reproduce(plan, tmp_path / RUNS)
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}


def test_an_included_plan_is_a_comparison_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    write(tmp_path / "inner", PLAN + "title: Inner\nbaseline: voco-1\n")
    plan = load_plan(write(tmp_path, PLAN + "include: [inner/plan.yaml]\n"))
    parts = list(plan.parts(tmp_path / "elsewhere"))
    assert [folder for _, folder in parts] == [
        tmp_path / "elsewhere",
        tmp_path / "elsewhere" / "inner",
    ]
    assert [(part.title, part.baseline) for part, _ in parts] == [
        ("etcbench: a comparison", "full"),
        ("Inner", "voco-1"),
    ]
    with pytest.raises(UsageError, match="no plan"):
        load_plan(write(tmp_path, PLAN + "include: [other/plan.yaml]\n"))


@pytest.mark.parametrize(
    "text, said",
    [
        ("runs: 3", "needs a list of runs"),
        ("runs: [", "is not YAML"),
        ("{runs: [], baselin: full}", "unknown baselin; a plan has title, baseline"),
        ("runs: [{methods: [full], tasks: [pope]}]", "run 1: models missing"),
        ("runs: [{models: [m], methods: [full], tasks: [pope], token: 3}]", "unknown field token"),
    ],
)
def test_a_wrong_plan_names_the_entry(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load_plan(write(tmp_path, text))


def test_a_missing_plan_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no plan"):
        load_plan(tmp_path / "plan.yaml")


def test_the_committed_plan_is_readable() -> None:
    plan = load_plan(results_folder("measured") / "micro" / "plan.yaml")
    assert {name for entry in plan.entries for name in entry["methods"]} >= {"full", "etc", "voco"}
    for part, folder in plan.parts(plan.file.parent):
        assert part.file.parent == folder
        for entry in part.entries:
            if "checkpoint" in entry:
                assert (folder / entry["checkpoint"] / "compressor_config.json").is_file()
