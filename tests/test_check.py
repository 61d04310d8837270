"""The regression gate: changed answers are found, ties are told from regressions."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import etcbench.check as check
import etcbench.cli
from etcbench.backbones import Backbone, load_backbone
from etcbench.check import Change, Expected, Verdict, compare_records, read_gate, run_gate

MEASURED = Path(__file__).parent.parent / "results" / "measured" / "micro" / "runs" / "micro-llava"


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("micro-llava", device="cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(check, "SAMPLES", 4)
    monkeypatch.setattr(check, "task_names", lambda: ["pope", "vqav2"])
    yield


def committed() -> list[Expected]:
    rows = read_gate(check.gate_file("micro-llava"))
    return [row for row in rows if row.method == "full" and row.task in ("pope", "vqav2")]


@pytest.mark.usefixtures("small")
def test_gate_finds_the_one_changed_answer_and_its_gap(backbone: Backbone) -> None:
    rows = committed()
    assert not run_gate(backbone, rows, ["full"]).failed
    place = next(i for i, row in enumerate(rows) if row.task == "pope")
    old = rows[place]
    wrong = "Yes" if old.response == "No" else "No"
    rows[place] = Expected(old.method, old.tokens, old.task, old.id, wrong)
    verdict = run_gate(backbone, rows, ["full"])
    (change,) = verdict.changes
    assert (change.id, change.old, change.new) == (old.id, wrong, old.response)
    # the model prefers its own answer, by more than rounding
    assert change.gap is not None and change.gap > check.TIE
    assert verdict.failed and change.verdict == "changed"


@pytest.mark.usefixtures("small")
def test_gate_names_what_has_no_counterpart(backbone: Backbone) -> None:
    rows = [row for row in committed() if row.task == "vqav2"]
    verdict = run_gate(backbone, [*rows, Expected("full", "7", "vqav2", "x", "")], ["full"])
    assert verdict.failed and not verdict.changes
    assert any("full 7" in line and "cannot run" in line for line in verdict.missing)
    assert any("pope" in line and "no committed answer" in line for line in verdict.missing)


def test_a_tie_does_not_fail() -> None:
    tie = Change("m", "1", "pope", "0", "g", "Yes", "No", gap=1e-5)
    clear = Change("m", "1", "pope", "0", "g", "Yes", "No", gap=0.5)
    unknown = Change("m", "1", "pope", "0", "g", "Yes", "No")
    assert not Verdict(1, (tie,)).failed
    assert Verdict(1, (tie, clear)).failed and Verdict(1, (unknown,)).failed


def test_every_method_that_comes_with_the_model_is_in_the_gate(backbone: Backbone) -> None:
    rows = {row.cell[:2] for row in read_gate(check.gate_file("micro-llava"))}
    assert set(check.gate_cells(backbone)) == rows


def copied(folder: Path, name: str, target: Path) -> Path:
    """Copy a run and unpack its records."""
    target.mkdir()
    for file in (folder / name).iterdir():
        packed = file.suffix == ".gz"
        content = gzip.decompress(file.read_bytes()) if packed else file.read_bytes()
        (target / (file.stem if packed else file.name)).write_bytes(content)
    return target


def plain_run(method: str, task: str) -> str:
    """Name of the run on the right pictures."""
    for path in sorted((MEASURED / method).glob(f"{task}-*")):
        config = json.loads((path / "manifest.json").read_text())["config"]
        if "shuffled" not in config["data"]:
            return path.name
    raise AssertionError(f"no {task} run of {method}")


def test_two_runs_are_compared_sample_by_sample(tmp_path: Path) -> None:
    name = plain_run("full", "pope")
    run = copied(MEASURED / "full", name, tmp_path / "new")
    assert not compare_records(run, MEASURED / "full" / name).failed
    lines = (run / "records.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    other = {**first, "response": first["response"] + " indeed"}
    (run / "records.jsonl").write_text("\n".join([json.dumps(other), *lines[2:]]) + "\n")
    verdict = compare_records(run, MEASURED / "full" / name)
    (change,) = verdict.changes
    assert change.id == first["id"] and change.new.endswith("indeed")
    assert verdict.failed and "1 answers" in verdict.missing[0]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["one"], "two runs"),
        (["a", "b", "--update"], "belong to the gate"),
        (["--model", "micro-lava"], "micro-llava"),
        (["nowhere", "neither"], "nowhere"),
    ],
)
def test_wrong_use_is_one_line(
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["etcbench", "check", *arguments])
    with pytest.raises(SystemExit) as caught:
        etcbench.cli.main()
    error = capsys.readouterr().err
    assert caught.value.code == 2 and said in error and len(error.splitlines()) == 1
