from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from samples import mme_rows, write_rows

from etcbench.errors import UsageError
from etcbench.loading import load_task
from etcbench.report import compare, render
from etcbench.store import open_run, run_path

CONFIG: dict[str, Any] = {
    "model": {"name": "llava", "revision": "abc"},
    "preprocessing": {"image": "pad"},
    "dtype": "float32",
    "method": "fastv",
    "tokens": "64",
    "options": {"layer": 2},
    "weights": {},
    "seed": 0,
    "task": "pope",
    "task_options": {},
    "data": "sha256:0123456789abcdef",
    "style": "llava",
    "mode": "official",
    "max_new_tokens": 16,
}
SUMMARY: dict[str, Any] = {
    "headline": {"f1": 87.25, "accuracy": 86.0},
    "unit": "%",
    "interval": {"low": 84.0, "high": 90.04, "method": "bootstrap"},
    "n": 400,
    "n_unparsed": 3,
    "n_error": 0,
    "n_missing": 0,
    "tokens": {"entering": 576.0, "layer_average": 64.0, "cached": 64.0},
    "marks": [],
    "micro": None,
}


def store(out: Path, config: dict[str, Any], summary: dict[str, Any] | None = None) -> Path:
    config = {**CONFIG, **config}
    path = run_path(out, config)
    with open_run(path, config, {"marks": [], "data": "hub"}) as run:
        run.begin({})
        if summary is not None:
            run.finish({**SUMMARY, **summary})
    return path


def cells(table: Any) -> list[dict[str, str]]:
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def test_a_row_per_method_and_a_column_per_task(tmp_path: Path) -> None:
    store(tmp_path, {"tokens": "64"}, {})
    store(tmp_path, {"tokens": "64", "task": "mme"}, {"unit": "points", "n": 20})
    tokens = {"entering": 576.0, "layer_average": 576.0, "cached": 576.0}
    store(tmp_path, {"method": "full", "tokens": None, "options": {}}, {"tokens": tokens})
    table = compare(tmp_path)
    full, fastv = cells(table)
    assert full == {
        "model": "llava",
        "method": "full",
        "tokens": "576",
        "tokens into LLM": "576",
        "layer average": "576",
        "pope f1 % n=400": "87.2 [84.0, 90.0]",
        "mme f1 points n=20": "",
    }
    assert (fastv["tokens"], fastv["tokens into LLM"], fastv["layer average"]) == (
        "64", "576", "64",
    )  # fmt: skip
    assert fastv["mme f1 points n=20"] == "87.2 [84.0, 90.0]"
    assert table.notes == [] and table.refused == 0


@pytest.mark.parametrize(
    "config",
    [
        {"data": "sha256:0123456789abcdef[12 rows 99]"},
        {"mode": "lmms"},
        {"style": "official"},
        {"max_new_tokens": 1},
        {"task_options": {"full": True}},
    ],
)
def test_scores_that_are_not_comparable_get_columns_of_their_own(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    store(tmp_path, {}, {})
    store(tmp_path, config, {"headline": {"f1": 50.0}})
    table = compare(tmp_path)
    (row,) = cells(table)
    headings = [name for name in row if name.startswith("pope")]
    assert len(headings) == 2
    assert any("(" in name for name in headings), headings
    assert sorted(row[name][:4] for name in headings) == ["50.0", "87.2"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"options": {"layer": 3}}, "(layer=3)"),
        ({"weights": {"checkpoint": "mine"}}, "(weights.checkpoint=mine)"),
        ({"seed": 4}, "(seed=4)"),
        ({"preprocessing": {"image": "processor"}}, "(preprocessing.image=processor)"),
        ({"dtype": "bfloat16"}, "(dtype=bfloat16)"),
        ({"model": {"name": "llava", "revision": "def"}}, "(model.revision=def)"),
    ],
)
def test_what_differs_between_similar_rows_is_written_out(
    tmp_path: Path, config: dict[str, Any], words: str
) -> None:
    store(tmp_path, {}, {})
    store(tmp_path, config, {})
    methods = [row["method"] for row in cells(compare(tmp_path))]
    assert len(methods) == 2
    assert any(words in method for method in methods), methods


def test_wrong_pictures_stand_behind_the_scores(tmp_path: Path) -> None:
    store(tmp_path, {"data": "sha256:aa pictures shuffled"}, {"headline": {"f1": 20.0}})
    store(tmp_path, {"data": "sha256:aa"}, {})
    store(tmp_path, {"data": "sha256:bb", "task": "vqav2"}, {})
    headings = [name.split(" [")[0].split(" n=")[0] for name in compare(tmp_path).columns[5:]]
    assert [heading.split()[0] for heading in headings] == ["pope", "vqav2", "pope"]
    assert "(" not in headings[0] and headings[2].endswith("(pictures=shuffled)"), headings


def test_the_same_run_in_two_folders_is_shown_twice(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        store(tmp_path / folder, {}, {})
    table = compare(tmp_path / "a", tmp_path / "b", tmp_path)
    assert len(table.rows) == 2
    assert str(tmp_path / "b") in table.rows[1][1]


def test_marks_are_shown_wherever_they_apply(tmp_path: Path) -> None:
    note = "micro figures: not comparable with published ones"
    marks = ["micro model", "micro data", "untrained"]
    store(tmp_path, {}, {"marks": marks, "micro": note})
    table = compare(tmp_path)
    (row,) = cells(table)
    assert row["model"] == "llava [micro]"
    assert row["method"] == "fastv [untrained]"
    assert "pope f1 % [micro] n=400" in row
    assert note in render(table, "md")
    assert json.loads(render(table, "json"))["runs"][0]["micro"] == note
    assert note in render(table, "csv")


def test_a_score_with_failed_samples_needs_partial(tmp_path: Path) -> None:
    path = store(tmp_path, {}, {"n_error": 2})
    table = compare(tmp_path)
    assert "87.2" not in render(table, "md") and "87.2" not in render(table, "json")
    assert table.refused == 1
    assert any(str(path) in note and "2 of 400" in note for note in table.notes)
    shown = compare(tmp_path, partial=True)
    assert "87.2 [84.0, 90.0] partial, n=398 of 400" in render(shown, "md")
    assert shown.refused == 0


def test_an_unfinished_run_needs_partial_and_is_scored_in_whole_groups(tmp_path: Path) -> None:
    write_rows(tmp_path / "data" / "mme.parquet", mme_rows(4))
    task = load_task("mme", tmp_path / "data")
    config = {
        **CONFIG, "task": "mme", "mode": "etcbench", "data": task.fingerprint,
    }  # fmt: skip
    about = {"marks": ["untrained"], "data": str(tmp_path / "data"), "split": None, "limit": None}
    path = run_path(tmp_path / "runs", config)
    with open_run(path, config, about) as run:
        run.begin({})
        run.append(
            {
                "id": doc.id, "status": "ok", "response": "Yes",
                "entering": 64, "layer_average": 64.0, "cached": 64.0,
            }
            for doc in list(task.docs)[:5]
        )  # fmt: skip
    table = compare(tmp_path / "runs")
    assert table.rows == [] and table.refused == 1
    assert "unfinished, 5 samples" in table.notes[0]
    shown = compare(tmp_path / "runs", partial=True)
    (row,) = cells(shown)
    assert row["mme total points n=8"].endswith("partial, n=4 of 8")
    assert row["method"] == "fastv [untrained]"
    assert "4 of 8 samples" in shown.notes[0]
    write_rows(tmp_path / "data" / "mme.parquet", mme_rows(5))
    changed = compare(tmp_path / "runs", partial=True)
    assert "not what the run began with" in changed.notes[0]


def test_formats(tmp_path: Path) -> None:
    store(tmp_path, {}, {})
    table = compare(tmp_path)
    (record,) = csv.DictReader(io.StringIO(render(table, "csv")))
    assert record["value"] == "87.25" and record["n"] == "400" and record["low"] == "84.0"
    assert json.loads(render(table, "json"))["runs"][0]["value"] == 87.25
    assert render(table, "md").splitlines()[1].startswith("|:")
    with pytest.raises(UsageError, match="md, csv, json"):
        render(table, "xlsx")


def test_nothing_to_compare_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no runs in"):
        compare(tmp_path)
