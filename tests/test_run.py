from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import mme_rows, pope_rows, write_rows
from tiny import save_tiny_llava, tiny_llava

import etcbench.run
from etcbench.backbones import Backbone
from etcbench.compressor import Budget
from etcbench.engine import Settings, answers
from etcbench.errors import BudgetError, MissingCheckpointError, UsageError
from etcbench.loading import load_task
from etcbench.run import evaluate, load_compressor
from etcbench.store import RunDirectory
from etcbench.sweep import Outcome, Sweep, exit_code, run_sweep


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llava(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def model(model_path: Path) -> Backbone:
    return tiny_llava(model_path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "mme.parquet", mme_rows(6))
    write_rows(folder / "pope.parquet", pope_rows(6))
    return folder


def summary_bytes(run: RunDirectory) -> bytes:
    return (run.path / "summary.json").read_bytes()


def test_a_run_records_every_sample_and_what_it_ran_on(
    model: Backbone, data: Path, tmp_path: Path
) -> None:
    method = load_compressor("random", 5, model, seed=3)
    run = evaluate(model, method, load_task("mme", data), out=tmp_path)
    again = RunDirectory.read(run.path)
    assert len(again.records) == 12
    assert {record["status"] for record in again.records.values()} == {"ok"}
    assert {record["entering"] for record in again.records.values()} == {5}
    assert len({record["prompt"] for record in again.records.values()}) == 2
    config = again.manifest["config"]
    assert config["options"] == {"seed": 3}
    assert config["tokens"] == "5"
    assert config["model"] == model.identity
    process = again.manifest["processes"][0]
    assert process["packages"]["torch"]
    assert process["attention"] == "sdpa"
    assert process["dtype"] == "float32"
    assert process["start"] <= process["end"]
    assert again.summary is not None
    assert again.summary["n"] == 12
    assert again.summary["tokens"] == {"entering": 5.0, "layer_average": 5.0, "cached": 5.0}
    assert again.summary["marks"] == []
    assert again.summary["micro"] is None


def test_nothing_that_may_not_change_an_answer_is_in_the_path(
    model: Backbone, data: Path, tmp_path: Path
) -> None:
    task = load_task("mme", data)
    paths = {
        evaluate(
            model, load_compressor("fastv", 20, model), task, settings=settings, out=tmp_path / name
        ).path.relative_to(tmp_path / name)
        for name, settings in {
            "a": Settings(),
            "b": Settings(batch_size=1),
            "c": Settings(reuse=False),
            "d": Settings(style="llava"),
        }.items()
    }
    assert len(paths) == 1
    other = evaluate(model, load_compressor("fastv", 20, model, layer=1), task, out=tmp_path / "a")
    assert other.path.name not in {path.name for path in paths}


def test_a_finished_run_is_read_and_not_run_again(
    model: Backbone, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = load_task("pope", data)
    first = evaluate(model, load_compressor("full", None, model), task, out=tmp_path)
    before = {path.name: path.read_bytes() for path in first.path.iterdir()}
    monkeypatch.setattr(etcbench.run, "answers", None)
    second = evaluate(model, load_compressor("full", None, model), task, out=tmp_path)
    assert second.summary == first.summary
    assert {path.name: path.read_bytes() for path in first.path.iterdir()} == before


@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_interrupted_run_ends_in_the_same_bytes(
    model: Backbone,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
) -> None:
    task = load_task("mme", data)
    whole = evaluate(model, load_compressor("fastv", 20, model), task, out=tmp_path / "whole")
    asked: list[str] = []

    def stops(backbone: Any, compressor: Any, task: Any, docs: Any, settings: Any) -> Iterator[Any]:
        for number, batch in enumerate(answers(backbone, compressor, task, docs, settings)):
            if number == 2 and not asked:
                raise KeyboardInterrupt
            yield batch

    def counts(
        backbone: Any, compressor: Any, task: Any, docs: Any, settings: Any
    ) -> Iterator[Any]:
        for batch in answers(backbone, compressor, task, docs, settings):
            asked.extend(answer.doc.id for answer in batch)
            yield batch

    settings = Settings(batch_size=batch_size)
    method = load_compressor("fastv", 20, model)
    monkeypatch.setattr(etcbench.run, "answers", stops)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, method, task, settings=settings, out=tmp_path / "halves")
    monkeypatch.setattr(etcbench.run, "answers", counts)
    resumed = evaluate(model, method, task, out=tmp_path / "halves")
    assert len(asked) == 12 - 2 * batch_size
    assert len(set(asked)) == len(asked)
    assert summary_bytes(resumed) == summary_bytes(whole)
    assert len(resumed.manifest["processes"]) == 2


def test_an_unreadable_picture_is_an_error_row_and_the_run_goes_on(
    model: Backbone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "mme.parquet", mme_rows(4, broken={1}))
    method = load_compressor("full", None, model)
    run = evaluate(model, method, load_task("mme", tmp_path), out=tmp_path / "runs")
    failed = {key for key, record in run.records.items() if record["status"] == "error"}
    assert failed == {"1.png#2", "1.png#3"}
    assert all("unreadable image" in run.records[key]["error"] for key in failed)
    assert all(run.records[key]["response"] is None for key in failed)
    assert run.summary is not None and run.summary["n_error"] == 2
    assert run.summary["n"] == 8
    before = (run.path / "records.jsonl").read_text().splitlines()
    again = evaluate(model, method, load_task("mme", tmp_path), out=tmp_path / "runs")
    after = (again.path / "records.jsonl").read_text().splitlines()
    assert after[: len(before)] == before
    assert {json.loads(line)["id"] for line in after[len(before) :]} == failed
    assert "other conditions" not in capsys.readouterr().err
    manifest = json.loads((run.path / "manifest.json").read_text())
    manifest["processes"][-1]["packages"]["torch"] = "1.0"
    (run.path / "manifest.json").write_text(json.dumps(manifest))
    evaluate(model, method, load_task("mme", tmp_path), out=tmp_path / "runs")
    assert 'other conditions: packages.torch: "1.0" -> ' in capsys.readouterr().err


def test_a_sweep_goes_on_and_says_why_a_cell_did_not_run(
    model_path: Path, data: Path, tmp_path: Path
) -> None:
    outcomes = run_sweep(
        Sweep(
            methods=["full", "random", "etc"],
            tasks=["mme", "pope"],
            budgets=[Budget(4), Budget(99)],
            model=str(model_path),
            data=str(data),
            out=tmp_path,
        )
    )
    found = {str(outcome.cell): outcome for outcome in outcomes}
    assert set(found) == {
        f"{method} {task}"
        for method in ("full", "random 4", "random 99", "etc 4", "etc 99")
        for task in ("mme", "pope")
    }
    assert found["full mme"].run and found["random 4 pope"].run
    assert isinstance(found["random 99 mme"].error, BudgetError)
    assert isinstance(found["etc 4 mme"].error, MissingCheckpointError)
    for words in ("--checkpoint", "etcbench train", "--untrained"):
        assert words in found["etc 4 mme"].reason
    assert exit_code(outcomes) == 0


def test_an_untrained_run_is_marked(model_path: Path, data: Path, tmp_path: Path) -> None:
    (outcome,) = run_sweep(
        Sweep(
            methods=["etc"],
            tasks=["pope"],
            budgets=[Budget(2)],
            model=str(model_path),
            data=str(data),
            untrained=True,
            out=tmp_path,
        )
    )
    assert outcome.run is not None and outcome.run.summary is not None
    assert outcome.run.summary["marks"] == ["untrained"]
    assert outcome.run.summary["tokens"]["entering"] == 2


def test_the_seed_reaches_methods_that_draw_and_leaves_no_trace(model: Backbone) -> None:
    before = torch.get_rng_state()
    assert load_compressor("random", 2, model, seed=7).options == {"seed": 7}
    weights = [
        load_compressor("etc", 2, model, untrained=True, seed=seed).compressor.module["tokens"]
        for seed in (0, 0, 1)
    ]
    assert weights[0].equal(weights[1]) and not weights[0].equal(weights[2])
    assert torch.get_rng_state().equal(before)


def test_exit_codes(model: Backbone, data: Path, tmp_path: Path) -> None:
    method = load_compressor("full", None, model)
    run = evaluate(model, method, load_task("pope", data), out=tmp_path)
    cell: Any = None
    done = Outcome(cell, run=run)
    budget = Outcome(cell, error=BudgetError("budget"))
    misuse = Outcome(cell, error=UsageError("no such column"))
    crash = Outcome(cell, error=RuntimeError("out of memory"))
    assert exit_code([done]) == 0
    assert exit_code([done, budget]) == 0
    assert exit_code([done, misuse]) == 1
    assert exit_code([done, crash]) == 1
    assert exit_code([budget, misuse]) == 2
    assert exit_code([budget, crash]) == 1


def test_one_broken_cell_does_not_stop_the_others(
    model_path: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(backbone: Any, compressor: Any, task: Any, docs: Any, settings: Any) -> Iterator[Any]:
        if task.name == "mme":
            raise RuntimeError("out of memory")
        return answers(backbone, compressor, task, docs, settings)

    monkeypatch.setattr(etcbench.run, "answers", fails)
    sweep = Sweep(
        methods=["full"], tasks=["mme", "pope"], model=str(model_path), data=str(data), out=tmp_path
    )
    broken, fine = run_sweep(sweep)
    assert broken.reason == "RuntimeError: out of memory"
    assert fine.run is not None
    assert exit_code([broken, fine]) == 1


def test_options_reach_the_methods_that_have_them() -> None:
    sweep = Sweep(methods=["full", "fastv"], tasks=["mme"], options={"layer": "1", "query": "all"})
    assert sweep.method_options() == {"full": {}, "fastv": {"layer": 1, "query": "all"}}
    for options, words in (
        ({"layr": "1"}, "layer"),
        ({"layer": "x"}, "whole number"),
        ({"query": "alle"}, "all"),
    ):
        with pytest.raises(UsageError, match=words):
            Sweep(methods=["fastv"], tasks=["mme"], options=options).method_options()


def test_two_samples_with_one_id_are_refused(model: Backbone, tmp_path: Path) -> None:
    rows = pope_rows(3)
    rows[2]["id"] = rows[0]["id"]
    write_rows(tmp_path / "pope.parquet", rows)
    with pytest.raises(UsageError, match="two samples have the id '0'"):
        evaluate(
            model,
            load_compressor("full", None, model),
            load_task("pope", tmp_path),
            out=tmp_path / "runs",
        )


def test_boxes_are_scored_by_the_size_of_their_pictures(model: Backbone, tmp_path: Path) -> None:
    run = evaluate(
        model,
        load_compressor("full", None, model),
        load_task("refcoco_rec", "micro", limit=2),
        mode="milli",
        out=tmp_path,
    )
    assert run.summary is not None
    assert run.summary["n"] >= 2
    assert set(run.summary["headline"]) >= {"acc@0.5", "mean_iou"}
    assert load_task("refcoco_rec", "micro", limit=2).to_score()[0].fields["size"] == (64, 64)
