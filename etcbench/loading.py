"""Open a benchmark's rows: embedded micro data, a local directory, or the hub."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from etcbench import registry
from etcbench.doc import Doc, Docs, Row
from etcbench.errors import UsageError, unknown_name
from etcbench.task import HubSource, Task

MICRO = Path(__file__).parent / "micro" / "data"
LMMS = "lmms:"
_SUFFIXES = (".parquet", ".jsonl", ".json")


@dataclass(frozen=True)
class LoadedTask:
    """A benchmark with its samples.

    Attributes
    ----------
    task : Task
        Prompts and scoring.
    docs : Docs
        The samples, lazily.
    data : str
        ``"micro"``, ``"hub"`` or the directory, as asked for.
    """

    task: Task
    docs: Docs
    data: str

    @property
    def fingerprint(self) -> str:
        """Identity of the rows: hub revision or content hash, and the choice of rows."""
        return self.docs.fingerprint

    def to_score(self) -> list[Doc]:
        """Every sample without its pictures, which are read only where scoring needs their size."""
        if self.task.scores_by_size:
            return [replace(doc, pictures=()) for doc in self.docs]
        return list(self.docs.without_pictures())


def task_names() -> list[str]:
    """Every name `make_task` accepts, variants included, sorted."""
    found = []
    for base in registry.names("tasks"):
        found += [base, *(f"{base}_{variant}" for variant in registry.load("tasks", base).variants)]
    return sorted(found)


def make_task(name: str, **options: Any) -> Task:
    """Build a benchmark by name, e.g. ``"mme"``, ``"mmbench_cn"`` or ``"lmms:mme"``.

    Raises
    ------
    UsageError
        If there is no such benchmark or it has no such option.
    """
    if name.startswith(LMMS):
        return _lmms().LmmsTask(name)
    known = registry.names("tasks")
    kind, chosen = None, dict(options)
    if name in known:
        kind = registry.load("tasks", name)
    for base in sorted(known, key=len, reverse=True):
        variant = name.removeprefix(f"{base}_")
        if kind is None and variant != name:
            candidate = registry.load("tasks", base)
            if variant in candidate.variants:
                kind, chosen = candidate, {**candidate.variants[variant], **options}
    if kind is None:
        raise unknown_name("task", name, task_names())
    accepted = [] if kind.__init__ is object.__init__ else inspect.signature(kind).parameters
    for option in chosen:
        if option not in accepted:
            offered = ", ".join(accepted) or "none"
            raise UsageError(f"task {name} has no option {option!r}; its options: {offered}")
    return kind(**chosen)


def load_task(
    name: str | Task,
    data: str | Path = "micro",
    split: str | None = None,
    limit: int | None = None,
    revision: str | None = None,
    **options: Any,
) -> LoadedTask:
    """Open a benchmark.

    Parameters
    ----------
    name : str or Task
        E.g. ``"mme"``, or ``"lmms:mme"`` for lmms-eval's prompt and scoring.
    data : str or Path
        ``"micro"``, ``"hub"``, or a directory with ``<task>.parquet``, ``<task>/<split>.parquet``
        or the same as ``.jsonl`` or ``.json``, in the hub's columns.
    split : str, optional
        The benchmark's own by default.
    limit : int, optional
        At least so many samples, in whole groups.
    revision : str, optional
        Revision of the hub dataset.
    **options
        Options of the benchmark.

    Raises
    ------
    UsageError
        If the benchmark, a file, a column or an option does not exist.
    """
    if isinstance(name, str) and name.startswith(LMMS):
        return _lmms().load(name, str(data), split, limit, revision)
    task = name if isinstance(name, Task) else make_task(name, **options)
    split = split or task.source.split
    build = task.doc
    if str(data) == "hub":
        table, fingerprint = task.open_hub(split, revision)
        where = fingerprint
    else:
        folder = MICRO if str(data) == "micro" else Path(data)
        path = local_file(folder, (task.name, task.stem or type(task).name), split)
        table, fingerprint, where = read_rows(path), content_hash([path]), str(path)

        def build(row: Row, index: int) -> Doc:
            return task.doc({**row, "folder": path.parent}, index)

    require_columns(table.column_names, task.columns, where)
    docs = task.choose(Docs(table, build, fingerprint, task.explode))
    return LoadedTask(task, docs if limit is None else docs.limit(limit), str(data))


def read_rows(path: Path) -> Any:
    """Memory-map the rows of a parquet, json or jsonl file, pictures left encoded.

    Raises
    ------
    UsageError
        If the file is not in the format of its ending.
    """
    import datasets

    try:
        with _without_progress_bars():
            if path.suffix == ".parquet":
                return _encoded(datasets.Dataset.from_parquet(str(path)))
            return _encoded(datasets.Dataset.from_json(str(path)))
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UsageError(f"{path} is not a readable {path.suffix[1:]} file: {reason}") from error


def content_hash(paths: Iterable[Path]) -> str:
    """``sha256:`` and 16 hex digits of the files' bytes."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return f"sha256:{digest.hexdigest()[:16]}"


def require_columns(present: Iterable[str], needed: Iterable[str], where: str) -> None:
    """Raise UsageError for the first missing column, naming it and the file."""
    have = list(present)
    for column in needed:
        if column not in have:
            raise UsageError(f"{where} has no column {column!r}; it has {', '.join(have)}")


def open_hub(source: HubSource, split: str, revision: str | None) -> tuple[Any, str]:
    """Load a hub dataset without a token, trying the id's older namespaces.

    Returns
    -------
    table : datasets.Dataset
    identity : str
        ``id@revision``, with the configuration and split.

    Raises
    ------
    UsageError
        If none of the ids can be loaded.
    """
    import datasets

    reasons = []
    for hub_id in source.ids:
        try:
            table = datasets.load_dataset(
                hub_id, source.config, split=split, revision=revision, token=False
            )
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reasons.append(f"{hub_id}: {str(error).splitlines()[0] if str(error) else error!r}")
            continue
        found = revision or revision_of(table)
        return _encoded(table), f"{hub_id}@{found}/{source.config or 'default'}/{split}"
    raise UsageError(
        f"cannot load {source.ids[0]} ({'; '.join(reasons)}); give a local directory with --data"
    )


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Local files open in a moment; the bar would only litter logs."""
    import datasets

    shown = datasets.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


class JoinedTable:
    """Rows with pictures that live in another table, joined when a row is read.

    Parameters
    ----------
    rows, pictures : datasets.Dataset
        The questions, and a table with a column ``image``.
    key, picture_key : str
        Columns that agree; the first of `rows`, the second of `pictures`.
    """

    def __init__(self, rows: Any, pictures: Any, key: str, picture_key: str) -> None:
        self._rows, self._pictures, self._key = rows, pictures, key
        self._place = {name: i for i, name in enumerate(pictures[picture_key])}
        self.column_names = [*rows.column_names, "image"]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int | str | slice) -> Any:
        if isinstance(index, str):
            return self._rows[index]
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        row = self._rows[index]
        place = self._place.get(row[self._key])
        image = None if place is None else self._pictures[place]["image"]
        return {**row, "image": image}

    def remove_columns(self, name: str) -> Any:
        """Leave the pictures out."""
        return self._rows


def revision_of(table: Any) -> str:
    """Commit of a loaded hub dataset, from the addresses its files came from."""
    for address in table.info.download_checksums or {}:
        if match := re.search(r"@([0-9a-f]{40})/", address):
            return match[1]
    for file in table.cache_files:
        # the cache folder of a data set on the hub is named after its commit
        if match := re.search(r"[/\\]([0-9a-f]{40,64})[/\\]", file["filename"]):
            return match[1]
    return f"content-{table._fingerprint}"


def local_file(folder: Path, stems: Sequence[str], split: str) -> Path:
    """Find the file with a benchmark's rows under one of its names.

    Raises
    ------
    UsageError
        If the folder or the file does not exist.
    """
    if not folder.is_dir():
        raise UsageError(f"data directory {folder} does not exist; give hub, micro or a directory")
    for stem in stems:
        for suffix in _SUFFIXES:
            for path in (folder / stem / f"{split}{suffix}", folder / f"{stem}{suffix}"):
                if path.is_file():
                    return path
    listed = sorted(p.relative_to(folder) for s in _SUFFIXES for p in folder.glob(f"**/*{s}"))
    there = ", ".join(map(str, listed[:12])) or "no data file"
    raise UsageError(f"{folder} has no {stems[-1]}.parquet; there is {there}")


def _lmms() -> Any:
    """Import the adapter of lmms-eval's benchmarks, an optional part."""
    try:
        return importlib.import_module("etcbench.lmms.task")
    except ModuleNotFoundError as error:
        raise UsageError(
            f'lmms-eval tasks need an extra, {error.name} is missing: pip install "etcbench[lmms]"'
        ) from error


def _encoded(table: Any) -> Any:
    """Leave pictures as the bytes they are stored in."""
    import datasets

    feature = table.features.get("image")
    if isinstance(feature, datasets.Image):
        return table.cast_column("image", datasets.Image(decode=False))
    inner = getattr(feature, "feature", None)
    if isinstance(inner, datasets.Image):
        return table.cast_column("image", datasets.List(datasets.Image(decode=False)))
    return table
