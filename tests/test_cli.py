from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from samples import mme_rows, pope_rows, write_rows
from tiny import save_tiny_llava

import etcbench.cli
from etcbench.options import convert, pairs

COMMANDS = (
    "run",
    "compare",
    "score",
    "train",
    "inspect",
    "check",
    "reproduce",
    "list",
    "doctor",
    "fetch",
)


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def complaint(self) -> str:
        """The one line that explains what is wrong."""
        assert self.code == 2, (self.code, self.out, self.err)
        lines = self.err.strip().splitlines()
        assert lines[-1].startswith("etcbench: ")
        assert "Traceback" not in self.err
        return lines[-1]


@pytest.fixture
def cli(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> object:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["etcbench", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            etcbench.cli.main()
        output = capsys.readouterr()
        return Result(int(str(caught.value.code)), output.out, output.err)

    return call


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llava(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "mme.parquet", mme_rows(4))
    write_rows(folder / "pope.parquet", pope_rows(4))
    return folder


def test_every_command_has_an_example(cli) -> None:
    assert set(COMMANDS) <= {command.name for command in etcbench.cli.app.registered_commands} | {
        command.callback.__name__ for command in etcbench.cli.app.registered_commands
    }
    for command in etcbench.cli.app.registered_commands:
        name = command.name or command.callback.__name__
        result = cli(name, "--help")
        assert result.code == 0
        assert f"Example:\n    etcbench {name}" in result.out, name


def test_version(cli) -> None:
    result = cli("--version")
    assert (result.code, result.out) == (0, f"etcbench {version('etcbench')}\n")


def test_help_and_import_pull_in_nothing_heavy() -> None:
    code = (
        "import sys, etcbench, etcbench.cli\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pandas', 'numpy', 'PIL', 'peft'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_python_interface_is_there() -> None:
    import etcbench

    for name in etcbench.__all__:
        assert callable(getattr(etcbench, name))
    with pytest.raises(AttributeError, match="evaluat"):
        etcbench.evaluat  # noqa: B018


def test_a_run_prints_a_table_and_the_same_command_prints_it_again(cli, model, data) -> None:
    arguments = ("run", "--model", model, "--data", data, "--method", "full,random",
                 "--tokens", "4", "--tokens", "2", "--task", "mme,pope")  # fmt: skip
    first = cli(*arguments)
    assert first.code == 0, first.err
    lines = first.out.strip().splitlines()
    assert len(lines) == 2 + 3
    assert "mme total points n=8" in lines[0] and "pope f1 % n=4" in lines[0]
    assert "micro" not in first.out
    again = cli(*arguments)
    assert again.out == first.out
    compared = cli("compare", "runs")
    assert compared.code == 0
    assert sorted(compared.out.strip().splitlines()[2:]) == sorted(lines[2:])
    machine = json.loads(cli(*arguments, "--json").out)
    assert len(machine["runs"]) == 6 and machine["not_run"] == []
    Path("elsewhere").mkdir()
    assert cli("list", "runs", "--out", "elsewhere").out.startswith("no runs in elsewhere; start")
    listed = json.loads(cli("list", "runs", "--json").out)
    assert {run["state"] for run in listed} == {"done, n=8", "done, n=4"}


def test_kill_9_then_the_same_command_gives_the_same_bytes(cli, model, tmp_path) -> None:
    write_rows(tmp_path / "mme.parquet", mme_rows(40))
    arguments = ["run", "--method", "random", "--tokens", "4", "--task", "mme",
                 "--model", str(model), "--data", str(tmp_path), "--batch-size", "1"]  # fmt: skip
    command = [sys.executable, "-c", "from etcbench.cli import main; main()", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        deadline = time.monotonic() + 280
        while not (begun := list(Path("runs").rglob("records.jsonl"))):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not (begun[0].parent / "summary.json").exists()
    assert 0 < len(begun[0].read_text().splitlines()) < 80
    resumed = cli(*arguments)
    assert resumed.code == 0, resumed.err
    assert "n=80" in resumed.out
    assert cli(*arguments, "--out", "whole", "--batch-size", "7").code == 0
    (killed,), (whole,) = (list(Path(out).rglob("summary.json")) for out in ("runs", "whole"))
    assert killed.read_bytes() == whole.read_bytes()
    assert killed.relative_to("runs") == whole.relative_to("whole")


def test_micro_data_is_called_micro(cli, model) -> None:
    result = cli("run", "--model", model, "--data", "micro", "--method", "random", "--tokens", "4",
                 "--task", "mme", "--limit", "2")  # fmt: skip
    assert result.code == 0, result.err
    assert "micro figures: not comparable with published ones" in result.out
    assert all("micro" in line for line in result.err.strip().splitlines())
    assert "[micro]" in result.out


def test_an_unreadable_image_gives_exit_code_1_and_names_the_sample(cli, model, tmp_path) -> None:
    write_rows(tmp_path / "mme.parquet", mme_rows(3, broken={2}))
    arguments = ("run", "--model", model, "--data", tmp_path, "--method", "full", "--task", "mme")
    result = cli(*arguments)
    assert result.code == 1
    assert "sample 2.png#4: unreadable image" in result.err
    assert "not shown" in result.out and "2 of 6 samples failed" in result.out
    partial = cli(*arguments, "--partial")
    assert partial.code == 1
    assert "partial, n=4 of 6" in partial.out
    assert cli("compare").code == 1
    assert cli("compare", "--partial").code == 0


def test_a_sweep_lists_what_it_could_not_run(cli, model, data) -> None:
    result = cli("run", "--model", model, "--data", data, "--method", "full,fastv,etc",
                 "--tokens", "2", "--task", "mme,pope")  # fmt: skip
    assert result.code == 0
    lines = [line for line in result.err.splitlines() if "not run" in line]
    assert len(lines) == 2
    assert "fastv 2 on mme, pope" in lines[0] and "it can serve" in lines[0]
    assert "etc 2 on mme, pope" in lines[1] and "--untrained" in lines[1]
    nothing = cli("run", "--model", model, "--data", data, "--method", "fastv,etc",
                  "--tokens", "2", "--task", "mme")  # fmt: skip
    assert nothing.code == 2
    assert nothing.out == ""


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"--method": "fastvv"}, "unknown method 'fastvv'; did you mean fastv"),
        ({"--method": ","}, "nothing to run"),
        ({"--task": "mmme"}, "unknown task 'mmme'; did you mean mme"),
        ({"--model": "micro-lava"}, "unknown model 'micro-lava'"),
        ({"--model": "./not/here"}, "model directory ./not/here does not exist"),
        ({"--tokens": "0"}, "at least 1 token"),
        ({"--tokens": "-1"}, "at least 1 token"),
        ({"--tokens": "many"}, "write 64, kept:64 or 1/9"),
        ({"--tokens": "37"}, "only 36 visual tokens; ask for 1 to 36"),
        ({"--limit": "0"}, "--limit 0"),
        ({"--style": "llavaa"}, "did you mean llava"),
        ({"--mode": "oficial"}, "did you mean official"),
        ({"--dtype": "float23"}, "did you mean float32"),
        ({"--attention": "fast"}, "sdpa"),
        ({"--device": "gpu"}, "--device gpu cannot be used here"),
        ({"--option": "seed"}, "KEY=VALUE"),
        ({"--option": "sed=1"}, "did you mean seed"),
        ({"--model-option": "image=pat"}, "did you mean pad"),
        ({"--data": "nowhere"}, "data directory nowhere does not exist"),
        ({"--wrong": "x"}, "No such option: --wrong"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(cli, model, data, changed, words) -> None:
    good = {"--model": model, "--data": data, "--method": "random", "--tokens": "4",
            "--task": "mme", **changed}  # fmt: skip
    result = cli("run", *(str(part) for pair in good.items() for part in pair))
    assert words in result.complaint
    assert result.out == ""
    assert len(result.err.strip().splitlines()) == 1


def test_a_model_directory_without_weights_says_what_is_missing(cli, model, data, tmp_path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    result = cli("run", "--model", folder, "--data", data, "--method", "full", "--task", "mme")
    assert "has no weights" in result.complaint


def test_a_missing_column_is_named(cli, model, tmp_path) -> None:
    rows = [{k: v for k, v in row.items() if k != "category"} for row in mme_rows(2)]
    write_rows(tmp_path / "mme.parquet", rows)
    write_rows(tmp_path / "pope.parquet", pope_rows(2))
    arguments = ("run", "--model", model, "--data", tmp_path, "--method", "full")
    assert "mme.parquet has no column 'category'" in cli(*arguments, "--task", "mme").complaint
    both = cli(*arguments, "--task", "mme,pope")
    assert both.code == 1, "a benchmark that was asked for is missing from the table"
    assert "no column 'category'" in both.err and "pope f1" in both.out


def test_a_changed_config_in_a_run_directory_is_shown(cli, model, data, tmp_path) -> None:
    arguments = ("run", "--model", model, "--data", data, "--method", "full", "--task", "mme")
    assert cli(*arguments).code == 0
    manifest = next(tmp_path.rglob("manifest.json"))
    content = json.loads(manifest.read_text())
    content["config"]["seed"] = 5
    manifest.write_text(json.dumps(content))
    assert "seed: 5 -> 0" in cli(*arguments).complaint


def test_interruption_says_how_to_continue(cli, model, data, monkeypatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("etcbench.run.answers", interrupted)
    result = cli("run", "--model", model, "--data", data, "--method", "full", "--task", "mme")
    assert result.code == 130
    assert "the same command continues the run" in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize("kind", ["methods", "tasks", "models"])
def test_lists_are_filled(cli, kind) -> None:
    result = cli("list", kind, "--json")
    rows = json.loads(result.out)
    assert rows and all(row for row in rows)
    names = {next(iter(row.values())) for row in rows}
    expected = {"methods": "etc", "tasks": "mme", "models": "a directory or hub id"}[kind]
    assert expected in names
    assert "did you mean methods" in cli("list", "method").complaint


def test_doctor_says_what_is_there(cli) -> None:
    state = json.loads(cli("doctor", "--json").out)
    assert state["versions"]["torch"]
    assert {extra["extra"] for extra in state["extras"]} == {"lmms", "caption", "test", "dev"}
    text = cli("doctor").out
    assert "torch" in text and "default dtype" in text


def test_a_trained_checkpoint_is_used_and_recorded(cli, model, tmp_path) -> None:
    recipe = tmp_path / "short.yaml"
    recipe.write_text(
        f"{{method: etc, tokens: 2, model: {model}, data: micro, turns: 2,"
        " stages: [{steps: 1, batch_size: 2, warmup_steps: 1}]}"
    )
    trained = cli("train", "--config", recipe, "--out", tmp_path / "training")
    assert trained.code == 0, trained.err
    result = trained.out.strip().splitlines()[-1]
    arguments = ("run", "--model", model, "--data", "micro", "--task", "pope", "--limit", "2",
                 "--checkpoint", result)  # fmt: skip
    found = cli(*arguments, "--method", "etc,full", "--tokens", "2")
    assert found.code == 0, found.err
    assert "untrained" not in found.out
    manifest = json.loads(next(tmp_path.glob("runs/*/etc-2/*/manifest.json")).read_text())
    assert manifest["config"]["weights"]["checkpoint"] == "result"
    other = cli(*arguments, "--method", "etc", "--tokens", "3")
    assert "tokens 2 instead of 3" in other.complaint
    useless = cli(*arguments, "--method", "full")
    assert "method etc instead of full" in useless.complaint


def test_training_needs_a_recipe(cli) -> None:
    assert "micro-etc-1 (etc)" in cli("train").complaint
    assert "no recipe for method 'fastv'" in cli("train", "--method", "fastv").complaint


def test_score_reads_the_records_of_a_run(cli, model, data) -> None:
    run = ("run", "--model", model, "--data", data, "--method", "full", "--task", "mme")
    assert cli(*run).code == 0
    (records,) = Path("runs").rglob("records.jsonl")
    summary = json.loads((records.parent / "summary.json").read_text())
    arguments = ("score", "--task", "mme", "--predictions", records, "--data", data)
    scored = json.loads(cli(*arguments, "--json").out)
    assert scored == {key: summary[key] for key in scored}
    text = cli(*arguments).out
    assert "mme total points" in text and "subtask existence: acc_plus" in text
    assert "do not exist" in cli("score", "--task", "mme", "--predictions", "none").complaint


def test_fetch_needs_something_to_fetch(cli) -> None:
    assert "nothing to fetch" in cli("fetch").complaint
    assert "did you mean mme" in cli("fetch", "--task", "mmee").complaint


def test_fetch_without_a_network_is_one_line(cli, monkeypatch) -> None:
    import huggingface_hub

    def fails(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    assert "cannot download a/b: no route" in cli("fetch", "--model", "a/b").complaint


def test_options_are_read_by_their_declared_types() -> None:
    assert pairs(["a-b=c=d", "e= f "], "--option") == {"a_b": "c=d", "e": "f"}
    assert convert("3", int | None, "x") == 3
    assert convert("none", int | None, "x") is None
    assert convert("yes", bool, "x") is True
    assert convert("0.5", float, "x") == 0.5
