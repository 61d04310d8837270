"""One run = one directory: a manifest, append-only records, a summary written last.

``<out>/<model>/<method>-<tokens>/<task>-<8 hex of the config hash>/`` holds ``manifest.json``
(what ran, and each process that worked on it), ``records.jsonl`` (one line per sample, flushed to
disk per batch) and ``summary.json``. A run that was killed continues where it stopped; history is
never rewritten, and the summary does not show that there was a break. A finished run that is kept
in a repository has its records compressed (``records.jsonl.gz``, `pack`).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from etcbench.budget import Budget
from etcbench.errors import UsageError
from etcbench.records import Records

Json = dict[str, Any]
PACKED = "records.jsonl.gz"


@dataclass
class RunDirectory:
    """One run on disk.

    Attributes
    ----------
    path : Path
        The directory.
    manifest : dict
        ``config`` (what is hashed), ``about`` (what is recorded beside it) and ``processes``.
    records : mapping of str to dict
        The last record of each sample, by id; read from the file when asked for (`Records`).
    summary : dict or None
        The score, if the run has ended.
    notices : list of str
        What a person should know about the state it was found in.
    """

    path: Path
    manifest: Json
    records: Mapping[str, Json] = field(default_factory=dict)
    summary: Json | None = None
    notices: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> RunDirectory:
        """Read a run without touching it; a torn last record is ignored.

        Raises
        ------
        UsageError
            If a file of it is damaged.
        """
        run = cls(path, _read_json(path / "manifest.json"))
        run.records = _records(path)[0]
        if (path / "summary.json").is_file():
            run.summary = _read_json(path / "summary.json")
        return run

    @property
    def answered(self) -> set[str]:
        """Ids of the samples with an answer; those that errored are asked again."""
        return {key for key, record in self.records.items() if record["status"] == "ok"}

    @property
    def tokens(self) -> int:
        """Tokens asked for, however a method counts them; 0 for one without a budget.

        Of a share, what it is of 576.
        """
        asked = self.manifest["config"]["tokens"]
        return Budget.parse(asked).tokens if asked else 0

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.summary is not None and self.summary["n_error"] == 0

    def begin(self, environment: Mapping[str, Any]) -> None:
        """Record that this process starts to work on the run."""
        self.manifest["processes"].append({"start": _now(), "end": None, **environment})
        write_json(self.path / "manifest.json", self.manifest)

    def append(self, records: Iterable[Json]) -> None:
        """Add a batch of records; they are on disk when this returns."""
        batch = list(records)
        lines = [(json.dumps(record, ensure_ascii=False) + "\n").encode() for record in batch]
        if not isinstance(self.records, Records):
            self.records = Records(self.path / "records.jsonl", self.records)
        with (self.path / "records.jsonl").open("ab") as file:
            start = file.tell()
            file.write(b"".join(lines))
            file.flush()
            os.fsync(file.fileno())
        for record, line in zip(batch, lines, strict=True):
            self.records.note(record["id"], start)
            start += len(line)

    def drafting(self) -> dict[str, float | None]:
        """Share of drafted tokens that were accepted, and tokens gained by each verification.

        None where nothing was drafted. The summary leaves both out: unlike an answer, a draft may
        depend on the last digit of a probability.
        """
        total = Counter[str]()
        for record in self.records.values():
            total.update(record.get("drafts", {}))
        passes, drafted = total["verifications"], total["drafted"]
        return {
            "acceptance": total["accepted"] / drafted if drafted else None,
            "tokens_per_verification": (total["accepted"] + passes) / passes if passes else None,
        }

    def finish(self, summary: Json) -> None:
        """Write the summary, then the end time."""
        self.summary = summary
        write_json(self.path / "summary.json", summary)
        self.manifest["processes"][-1]["end"] = _now()
        write_json(self.path / "manifest.json", self.manifest)


@contextmanager
def open_run(path: Path, config: Json, about: Json) -> Iterator[RunDirectory]:
    """Open or create a run for writing; no other process can open it meanwhile.

    Parameters
    ----------
    path : Path
        The run's directory.
    config : dict
        Everything that may change an answer or the score.
    about : dict
        What else the manifest records, e.g. where the data was read from.

    Raises
    ------
    UsageError
        If another process holds the run, its config differs, or a file of it is damaged.
    """
    path.mkdir(parents=True, exist_ok=True)
    try:
        # the operating system drops the lock with its process, so a killed run leaves none behind
        with FileLock(path / ".lock", timeout=0):
            yield _opened(path, json.loads(json.dumps(config)), about)
    except Timeout as error:
        raise UsageError(
            f"{path} is being written by another process; wait for it or give another --out"
        ) from error


def run_path(out: Path, config: Json) -> Path:
    """Where a run with this config belongs."""
    method = config["method"]
    if config["tokens"] is not None:
        method += "-" + config["tokens"].replace(":", "").replace("/", "of")
    parts = (config["model"]["name"], method, f"{config['task']}-{config_hash(config)}")
    return out.joinpath(*(re.sub(r"[^\w.+-]", "_", part) for part in parts))


def config_hash(config: Json) -> str:
    """First 8 hex digits of the SHA-256 of a config."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def find_runs(root: Path) -> list[Path]:
    """Directories of runs at or below ``root``, sorted.

    Raises
    ------
    UsageError
        If ``root`` does not exist.
    """
    if not root.is_dir():
        raise UsageError(f"{root} is not a directory; name a run or a folder with runs in it")
    return sorted(path.parent for path in root.rglob("manifest.json"))


def pack(path: Path) -> None:
    """Compress the records of a finished run; the same records give the same bytes.

    Raises
    ------
    UsageError
        If the run has not ended.
    """
    run = RunDirectory.read(path)
    if not run.finished:
        raise UsageError(f"{path} is not finished; the same command continues it")
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in run.records.values()]
    # a fixed time stamp, or the same records would compress to other bytes
    packed = gzip.compress("".join(lines).encode(), mtime=0)
    temporary = path / f".{PACKED}.{os.getpid()}"
    temporary.write_bytes(packed)
    temporary.replace(path / PACKED)
    (path / "records.jsonl").unlink(missing_ok=True)


def write_json(path: Path, content: Json) -> None:
    """Write through a temporary file, so that a reader sees the old or the new file, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List the entries in which two configs differ, as ``key: old -> new``."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {json.dumps(a)} -> {json.dumps(b)}")
    return found


def _opened(path: Path, config: Json, about: Json) -> RunDirectory:
    if not (path / "manifest.json").is_file():
        if (path / "records.jsonl").exists():
            raise UsageError(f"{path} has records but no manifest.json; give another --out")
        return RunDirectory(path, {"config": config, "about": about, "processes": []})
    run = RunDirectory.read(path)
    if changed := differences(run.manifest["config"], config):
        raise UsageError(
            f"{path} holds a run with a different config ({'; '.join(changed)}); give another --out"
        )
    _, whole = _records(path)
    if torn := _size(path / "records.jsonl") - whole:
        os.truncate(path / "records.jsonl", whole)
        run.notices.append(
            f"{path / 'records.jsonl'} ended in the middle of a line; dropped those {torn} bytes, "
            "the sample is asked again"
        )
    return run


def _read_packed(path: Path) -> dict[str, Json]:
    """Read the records of a kept run, by id; none where there is no such file."""
    if not path.is_file():
        return {}
    try:
        lines = gzip.decompress(path.read_bytes()).splitlines()
        return {record["id"]: record for record in map(json.loads, lines)}
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error


def _records(path: Path) -> tuple[Records, int]:
    """Last record of each id, and the length in bytes of what is whole in the file of records."""
    file = path / "records.jsonl"
    records, whole = Records(file, _read_packed(path / PACKED)), 0
    if not file.is_file():
        return records, whole
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                key = json.loads(line)["id"]
                if line.endswith(b"\n"):
                    records.note(key, whole)
                    whole += len(line)
            except (ValueError, KeyError, TypeError) as error:
                if lines.read(1):  # only the last line may be torn
                    raise UsageError(
                        f"{file} line {number} is not a record; remove that line and its sample is "
                        "asked again"
                    ) from error
    return records, whole


def _read_json(path: Path) -> Json:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
