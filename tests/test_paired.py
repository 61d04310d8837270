"""Differences to a baseline on the same samples, and the hard samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from etcbench.errors import UsageError
from etcbench.paired import Pairing
from etcbench.report import compare
from etcbench.store import RunDirectory, find_runs

MEASURED = Path(__file__).parent.parent / "results" / "measured" / "micro" / "runs" / "micro-llava"


def runs(task: str, *methods: str) -> list[RunDirectory]:
    """Committed runs on the right pictures with what comes trained, one per method."""
    found = []
    for method in methods:
        for path in find_runs(MEASURED / method):
            run = RunDirectory.read(path)
            config = run.manifest["config"]
            shipped = config["weights"].get("checkpoint", method) == method
            if config["task"] == task and "shuffled" not in config["data"] and shipped:
                found.append(run)
                break
    assert len(found) == len(methods)
    return found


def value(run: RunDirectory) -> float:
    assert run.summary is not None
    return float(next(iter(run.summary["headline"].values())))


@pytest.mark.parametrize("task", ["pope", "vqav2", "mme"])
def test_the_difference_is_that_of_the_scores_and_its_interval_is_paired(task: str) -> None:
    full, voco = runs(task, "full", "voco-1")
    difference = Pairing([full, voco]).differences("full")
    assert set(difference) == {voco.path}
    found = difference[voco.path]
    assert found.value == pytest.approx(value(voco) - value(full))
    assert found.low < found.value < found.high
    assert found.n == len(voco.records)


def test_a_run_against_itself_under_another_name_differs_by_nothing(tmp_path: Path) -> None:
    (full,) = runs("pope", "full")
    twin = RunDirectory(
        tmp_path,
        {**full.manifest, "config": {**full.manifest["config"], "method": "twin"}},
        full.records,
        full.summary,
    )
    found = Pairing([full, twin]).differences("full")[tmp_path]
    assert (found.value, found.low, found.high) == (0, 0, 0)


def test_a_baseline_may_be_named_by_its_checkpoint() -> None:
    full, voco = runs("pope", "full", "voco-1")
    assert voco.manifest["config"]["weights"]["checkpoint"] == "voco-1"
    voco.manifest["config"] |= {"weights": {"checkpoint": "mine"}}
    assert set(Pairing([full, voco]).differences("mine")) == {full.path}


def test_other_pictures_do_not_pair() -> None:
    everything = [RunDirectory.read(path) for path in find_runs(MEASURED / "voco-1")]
    (full,) = runs("pope", "full")
    paired = Pairing([full, *everything]).differences("full")
    assert paired  # neither other tasks nor shuffled pictures
    configs = [run.manifest["config"] for run in everything if run.path in paired]
    assert {config["task"] for config in configs} == {"pope"}
    assert not any("shuffled" in config["data"] for config in configs)
    assert len(paired) == len({config["weights"]["checkpoint"] for config in configs})


def test_hard_samples_are_those_the_control_gets_wrong(tmp_path: Path) -> None:
    full, blind = runs("pope", "full", "blind")
    config = {**blind.manifest["config"], "method": "downsample", "tokens": "4"}
    control = RunDirectory(
        tmp_path, {**blind.manifest, "config": config}, blind.records, blind.summary
    )
    hard = Pairing([full, control]).hard()
    wrong = [key for key, record in control.records.items() if record["correct"] == 0]
    assert hard[control.path].value == 0 and hard[full.path].n == len(wrong)
    right = sum(full.records[key]["correct"] for key in wrong)
    assert hard[full.path].value == pytest.approx(100 * right / len(wrong))


def test_the_table_shows_both_and_names_an_unknown_baseline() -> None:
    paths = [run.path for run in runs("pope", "full", "voco-1")]
    table = compare(*paths, baseline="full", hard=True)
    cell = {row[1]: row[-1] for row in table.rows}
    assert ";" not in cell["full"] and "; -7" in cell["voco"]
    assert any("there are none" in note for note in table.notes)
    record = next(run for run in table.runs if run["method"] == "voco")
    assert record["difference_low"] < record["difference_value"] < record["difference_high"]
    json.dumps(table.runs)
    with pytest.raises(UsageError, match="there is full, voco-1"):
        compare(*paths, baseline="vooc")


def test_changed_data_is_refused() -> None:
    full, voco = runs("pope", "full", "voco-1")
    for run in (full, voco):
        run.manifest["config"] = {**run.manifest["config"], "data": "sha256:0"}
    with pytest.raises(UsageError, match="not what the run began with"):
        Pairing([full, voco]).differences("full")
