from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from etcbench.errors import UsageError
from etcbench.store import (
    PACKED,
    RunDirectory,
    config_hash,
    find_runs,
    open_run,
    pack,
    run_path,
)

CONFIG = {"model": {"name": "m/1"}, "method": "fastv", "tokens": "kept:64", "task": "mme"}
SUMMARY = {"headline": {"total": 1.0}, "n": 2, "n_error": 0}


def record(key: str, status: str = "ok", **more: Any) -> dict[str, Any]:
    return {"id": key, "status": status, "response": "yes\u2028é\n", **more}


def write(path: Path, *records: dict[str, Any]) -> None:
    with open_run(path, CONFIG, {}) as run:
        run.begin({"device": "cpu"})
        run.append(records)


def test_the_path_names_model_method_tokens_task_and_config() -> None:
    path = run_path(Path("out"), CONFIG)
    assert path == Path("out/m_1/fastv-kept64") / f"mme-{config_hash(CONFIG)}"
    assert run_path(Path("out"), {**CONFIG, "tokens": None}).parent.name == "fastv"
    assert config_hash({**CONFIG, "seed": 1}) != config_hash(CONFIG)
    assert config_hash(dict(reversed(CONFIG.items()))) == config_hash(CONFIG)


def test_records_survive_and_the_last_of_an_id_wins(tmp_path: Path) -> None:
    write(tmp_path, record("a", "error", error="broken"), record("b"))
    before = (tmp_path / "records.jsonl").read_bytes()
    with open_run(tmp_path, CONFIG, {}) as run:
        assert run.answered == {"b"}
        run.begin({})
        run.append([record("a")])
        assert run.answered == {"a", "b"}
        run.finish(SUMMARY)
    assert (tmp_path / "records.jsonl").read_bytes().startswith(before)
    again = RunDirectory.read(tmp_path)
    assert again.finished
    assert again.records["a"] == record("a")
    assert len(again.manifest["processes"]) == 2
    assert again.manifest["processes"][0]["end"] is None
    assert again.manifest["processes"][1]["end"] is not None


def test_a_packed_run_reads_as_before_and_is_the_same_bytes_again(tmp_path: Path) -> None:
    write(tmp_path, record("a"))
    with pytest.raises(UsageError, match="not finished"):
        pack(tmp_path)
    with open_run(tmp_path, CONFIG, {}) as opened:
        opened.begin({})
        opened.append([record("b")])
        opened.finish(SUMMARY)
    before = dict(RunDirectory.read(tmp_path).records)
    pack(tmp_path)
    first = (tmp_path / PACKED).read_bytes()
    assert not (tmp_path / "records.jsonl").exists()
    time.sleep(1.1)  # a gzip header has its time in seconds
    pack(tmp_path)
    assert (tmp_path / PACKED).read_bytes() == first
    with open_run(tmp_path, CONFIG, {}) as opened:
        assert opened.finished and opened.records == before
    (tmp_path / PACKED).write_bytes(first[:-9])
    with pytest.raises(UsageError, match=PACKED):
        RunDirectory.read(tmp_path)


@pytest.mark.parametrize("torn", [b'{"id": "c", "sta', b'{"id": "c", "status": "ok"}', b"\0\0\0\n"])
def test_a_torn_last_line_is_dropped_with_a_notice(tmp_path: Path, torn: bytes) -> None:
    write(tmp_path, record("a"))
    path = tmp_path / "records.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert set(RunDirectory.read(tmp_path).records) == {"a"}
    assert path.read_bytes() == whole + torn, "reading must not write"
    with open_run(tmp_path, CONFIG, {}) as run:
        assert run.answered == {"a"}
        assert any("middle of a line" in line for line in run.notices)
        run.append([record("c")])
    lines = path.read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["id"] for line in lines if line] == ["a", "c"]


def test_damage_further_up_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    write(tmp_path, record("a"), record("b"))
    path = tmp_path / "records.jsonl"
    path.write_bytes(b"{nonsense\n" + path.read_bytes())
    with pytest.raises(UsageError, match="line 1 is not a record"):
        RunDirectory.read(tmp_path)


def test_a_different_config_is_refused_with_the_difference(tmp_path: Path) -> None:
    write(tmp_path, record("a"))
    other = {**CONFIG, "tokens": "32", "model": {"name": "m/1", "revision": "x"}}
    with pytest.raises(UsageError) as caught, open_run(tmp_path, other, {}):
        pass
    assert 'tokens: "kept:64" -> "32"' in str(caught.value)
    assert 'model.revision: null -> "x"' in str(caught.value)
    assert "method" not in str(caught.value).partition("(")[2]


def test_records_without_a_manifest_are_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_text(json.dumps(record("a")) + "\n")
    with pytest.raises(UsageError, match="no manifest"), open_run(tmp_path, CONFIG, {}):
        pass


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    write(tmp_path, record("a"))
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UsageError, match=r"manifest\.json cannot be read"):
        RunDirectory.read(tmp_path)


def test_a_summary_with_errors_is_not_finished(tmp_path: Path) -> None:
    with open_run(tmp_path, CONFIG, {}) as run:
        run.begin({})
        run.append([record("a", "error", error="broken")])
        run.finish({**SUMMARY, "n_error": 1})
    assert not RunDirectory.read(tmp_path).finished


def test_a_summary_appears_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_run(tmp_path, CONFIG, {}) as run:
        run.begin({})
        run.append([record("a")])
        run.finish(SUMMARY)
        before = (tmp_path / "summary.json").read_bytes()
        monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            run.finish({**SUMMARY, "n": 3})
    assert (tmp_path / "summary.json").read_bytes() == before


def test_two_processes_cannot_write_one_run_and_a_dead_one_does_not_block(tmp_path: Path) -> None:
    code = (
        "import json, sys, time\n"
        "from pathlib import Path\n"
        "from etcbench.store import open_run\n"
        "with open_run(Path(sys.argv[1]), json.loads(sys.argv[2]), {}) as run:\n"
        "    print('open', flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path), json.dumps(CONFIG)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "open\n"
        with pytest.raises(UsageError, match="another process"), open_run(tmp_path, CONFIG, {}):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    started = time.monotonic()
    write(tmp_path, record("a"))
    assert time.monotonic() - started < 5


def test_runs_are_found_below_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "x" / "y", record("a"))
    write(tmp_path / "b", record("a"))
    assert find_runs(tmp_path) == [tmp_path / "b", tmp_path / "x" / "y"]
    assert find_runs(tmp_path / "b") == [tmp_path / "b"]
    with pytest.raises(UsageError, match="not a directory"):
        find_runs(tmp_path / "nowhere")
