"""Benchmarks of lmms-eval in our engine: ``--task lmms:<name>``.

Prompts, pictures, filters, scoring and aggregation are lmms-eval's own; what it does not have, an
interval, comes from leaving parts of the samples out. Figures keep the scale that lmms-eval gives
them (spec tasks 5).
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import io
import math
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from lmms_eval.api.instance import Instance
from lmms_eval.api.task import ConfigurableTask
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import load_yaml_config
from tenacity import RetryError

from etcbench.doc import Doc, Docs, Row
from etcbench.errors import UsageError, unknown_name
from etcbench.lmms import MODEL_NAME
from etcbench.lmms.samples import Decoding, question_text, sample
from etcbench.loading import LMMS, MICRO, LoadedTask, content_hash, local_file, revision_of
from etcbench.scoring.statistics import Floats, Interval
from etcbench.task import Breakdown, Parsed, Scored, Task

BLOCKS = 50
Payloads = dict[str, list[Any]]


class LmmsTask(Task):
    """A generate task of lmms-eval with its own prompt and scoring.

    Parameters
    ----------
    name : str
        ``"lmms:"`` and a name that ``lmms-eval --tasks list`` prints.
    harness : ConfigurableTask, optional
        lmms-eval's task with its data; without it there is nothing to ask or score.
    """

    columns = ()
    styles = ("lmms",)
    modes = ("lmms",)
    unit = "raw"

    def __init__(self, name: str, harness: Any = None) -> None:
        self.name = name
        self._harness = harness
        if harness is not None:
            self._decoding = Decoding.read(harness.config.generation_kwargs, name)
            self.max_new_tokens = self._decoding.max_new_tokens

    @property
    def harness(self) -> Any:
        """lmms-eval's task.

        Raises
        ------
        UsageError
            If the data was not opened.
        """
        if self._harness is None:
            raise UsageError(f"{self.name} is scored together with its data: use etcbench run")
        return self._harness

    def doc(self, row: Row, index: int) -> Doc:
        """Group by picture; the rest of the row stays where it is."""
        group = row.get("group", str(index))
        return Doc(str(index), group, row.get("image") or (), {"index": index}, None)

    def content(self, index: int) -> tuple[str, Sequence[Any]]:
        """Context and pictures of a row."""
        visuals = self.harness.doc_to_visual(self.harness.eval_docs[index])
        return self._context(index), visuals or ()

    def render(self, doc: Doc, style: str) -> str:
        """Write lmms-eval's context, without the picture placeholders in front of it."""
        return question_text(self._context(doc.fields["index"]), self.name)

    def parse(self, response: str, doc: Doc, mode: str) -> Parsed:
        """Keep the text; what it means is known to the benchmark's own scoring only."""
        text = self._decoding.cut(response).strip()
        return Parsed(text, "ok" if text else "unparsed")

    def outcome(self, parsed: Parsed, doc: Doc, mode: str) -> float:
        """Give the sample's figure of the headline metric; 0 where it has none of its own."""
        payload = next(iter(self._payload(doc, parsed.value).values()), None)
        if isinstance(payload, Mapping):
            payload = payload.get(self.harness.config.score_key)
        return float(payload) if isinstance(payload, int | float | np.number) else 0.0

    def headline(self, rows: Sequence[Scored], mode: str) -> dict[str, float]:
        """Aggregate every metric that comes out as a number, in the order of the task file."""
        figures = {}
        for name, payloads in self._payloads(rows).items():
            value = self._aggregate(name, payloads)
            if isinstance(value, int | float | np.number):
                figures[name] = float(value)
        if not figures:
            raise UsageError(f"{self.name}: its scoring gives no number; it may need a test server")
        return figures

    def breakdown(self, rows: Sequence[Scored], mode: str) -> Breakdown:
        """Give none: lmms-eval prints parts, but does not return them."""
        return {}

    def interval(self, rows: Sequence[Scored], mode: str) -> Interval:
        """Jackknife the headline over at most 50 blocks of groups, so that pairs stay together."""
        name, value = next(iter(self.headline(rows, mode).items()))
        if self._writes_file(name):
            return Interval(math.nan, math.nan, "none")
        blocks = [_block(row.doc.group) for row in rows]
        parts = []
        for block in sorted(set(blocks)):
            left = [row for row, b in zip(rows, blocks, strict=True) if b != block]
            payloads = self._payloads(left).get(name)
            parts += [float(self._aggregate(name, payloads))] if payloads else []
        if len(parts) < 2:
            return Interval(math.nan, math.nan, "none")
        spread = np.var(parts) * (len(parts) - 1)
        half = 1.959964 * math.sqrt(spread)
        return Interval(value - half, value + half, "jackknife")

    def table(self, rows: Sequence[Scored], mode: str) -> Floats:
        """Refuse: an arbitrary aggregation is no sum over samples."""
        raise UsageError(f"{self.name}: runs on lmms-eval's own scoring have no paired interval")

    def _context(self, index: int) -> str:
        harness = self.harness
        row = harness.eval_docs_no_media[index]
        return harness.fewshot_context(row, harness.config.num_fewshot or 0)

    def _payloads(self, rows: Sequence[Scored]) -> Payloads:
        """Collect what `process_results` says of the samples by metric, in the data's order."""
        found: Payloads = {name: [] for name in self.harness.aggregation()}
        for row in sorted(rows, key=lambda row: row.doc.fields["index"]):
            text = self._decoding.cut(row.response or "")
            for name, payload in self._payload(row.doc, text).items():
                found.setdefault(name, []).append(payload)
        return {name: payloads for name, payloads in found.items() if payloads}

    def _payload(self, doc: Doc, response: str) -> dict[str, Any]:
        """Filter and score one response; a filter's name follows the metric's, if it has one."""
        index, harness = doc.fields["index"], self.harness
        about = {"task": self.name, "doc_id": index, "repeats": 1}
        asked = Instance("generate_until", (), 0, metadata=about, resps=[response])
        harness._instances = [asked]
        harness.apply_filters()
        found = {}
        for number, (kind, text) in enumerate(asked.filtered_resps.items()):
            row = copy.deepcopy(harness.eval_docs_no_media[index])
            for name, payload in harness.process_results(row, [text]).items():
                if name in harness.aggregation():
                    found[name if number == 0 else f"{name},{kind}"] = payload
        order = list(harness.aggregation())
        return dict(sorted(found.items(), key=lambda item: order.index(item[0].split(",")[0])))

    def _aggregate(self, name: str, payloads: list[Any]) -> Any:
        """Call the metric's aggregation, which may print, and write files where it is called."""
        function = self.harness.aggregation()[name.split(",")[0]]
        with (
            tempfile.TemporaryDirectory() as folder,
            contextlib.chdir(folder),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            if self._writes_file(name):
                return function(copy.deepcopy(payloads), args=Namespace(output_path=folder))
            return function(copy.deepcopy(payloads))

    def _writes_file(self, name: str) -> bool:
        function = self.harness.aggregation()[name.split(",")[0]]
        return "args" in inspect.signature(function).parameters


class _Rows:
    """The rows of a task as `Docs` reads them; pictures only where they are asked for."""

    column_names = ("group", "image")

    def __init__(self, task: LmmsTask, groups: Sequence[str]) -> None:
        self._task, self._groups = task, groups

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        pictures = sample(partial(self._task.content, index), self._task.name)[1]
        return {"group": self._groups[index], "image": pictures}

    def remove_columns(self, name: str) -> list[Row]:
        """Leave the pictures out."""
        return [{"group": group} for group in self._groups]


def load(
    name: str, data: str, split: str | None, limit: int | None, revision: str | None
) -> LoadedTask:
    """Open a benchmark of lmms-eval.

    Parameters
    ----------
    name : str
        ``"lmms:"`` and the task's name.
    data : str
        ``"hub"``: what the task names; a folder with a task file (YAML) of that name; ``"micro"``
        or a folder with the rows as ``<task>.parquet``, ``.jsonl`` or ``.json`` in the columns
        that the task expects, ``<task>`` being its name or that of its data set.
    split, limit, revision
        See `etcbench.loading.load_task`.

    Raises
    ------
    UsageError
        If the task is none of lmms-eval's, does not generate text, or has no such data.
    """
    bare = name.removeprefix(LMMS)
    folder = None if data == "hub" else MICRO if data == "micro" else Path(data)
    config, file = _config(bare, folder)
    if config.get("output_type", "generate_until") != "generate_until":
        raise UsageError(f"{name} is a {config['output_type']} task; etcbench runs generate_until")
    which = "test_split" if config.get("test_split") else "validation_split"
    config[which] = split or config.get(which)
    # public data needs no token
    options = {**(config.get("dataset_kwargs") or {}), "token": False}
    if revision:
        options["revision"] = revision
    paths = [Path(path) for path in _files(options.get("data_files")) if Path(path).is_file()]
    if folder is not None and file is None:
        stem = str(config.get("dataset_path")).rpartition("/")[2].lower()
        paths = [local_file(folder, (bare, stem), config[which])]
        builder = "parquet" if paths[0].suffix == ".parquet" else "json"
        config |= {"dataset_path": builder, "dataset_name": None}
        options = {"data_files": {config[which]: str(paths[0])}}
    task = LmmsTask(name, _harness(name, {**config, "dataset_kwargs": options}))
    rows = task.harness.eval_docs
    identity = content_hash(paths) if paths else f"{config['dataset_path']}@{revision_of(rows)}"
    rules = f"lmms-eval {version('lmms-eval')}"
    fingerprint = " ".join(
        [identity, config[which], rules, *([content_hash([file])] if file else [])]
    )
    docs = Docs(_Rows(task, _groups(rows)), task.doc, fingerprint)
    return LoadedTask(task, docs if limit is None else docs.limit(limit), data)


def _config(name: str, folder: Path | None) -> tuple[dict[str, Any], Path | None]:
    """Find a task's settings, and its file if the folder has one."""
    if folder is not None and any(folder.rglob("*.yaml")):
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        if name not in manager.task_index:
            raise unknown_name(f"lmms-eval task in {folder}", name, manager.all_tasks)
        own = True
    else:
        manager, own = _builtin(), False
        if name not in manager.task_index:
            raise unknown_name("lmms-eval task", name, manager.all_tasks)
    entry = manager.task_index[name]
    if entry["type"] == "tag":
        members = entry["task"]
    elif entry["type"] == "group":
        members = load_yaml_config(entry["yaml_path"], mode="simple")["task"]
    elif entry["type"] == "task":
        path = Path(entry["yaml_path"])
        return load_yaml_config(str(path), mode="full"), path if own else None
    else:
        raise UsageError(f"lmms:{name} is a task with code of its own; etcbench runs task files")
    names = [member if isinstance(member, str) else member["task"] for member in members]
    raise UsageError(f"lmms:{name} is a {entry['type']}; name one of its tasks: {', '.join(names)}")


@cache
def _builtin() -> TaskManager:
    """Index lmms-eval's own task files, a few seconds' work."""
    return TaskManager(model_name=MODEL_NAME)


def _harness(name: str, config: dict[str, Any]) -> ConfigurableTask:
    try:
        return ConfigurableTask(config=config, model_name=MODEL_NAME)
    except RetryError as error:
        reason = str(error.last_attempt.exception()).strip().split("\n")[0]
        raise UsageError(
            f"{name}: its data cannot be loaded ({reason}); give a local directory with --data"
        ) from error


def _files(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [path for part in value.values() for path in _files(part)]
    return [value] if isinstance(value, str) else list(value or ())


def _groups(rows: Any) -> list[str]:
    """Give rows with the same encoded pictures the same name; a row without any stands alone."""
    columns = [n for n, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    if not columns:
        return [str(index) for index in range(len(rows))]
    bare = rows.select_columns(columns)
    for column in columns:
        bare = bare.cast_column(column, datasets.Image(decode=False))
    names = []
    for index, row in enumerate(bare):
        digest = hashlib.sha256()
        for column in columns:
            stored = row[column] or {}
            digest.update(stored.get("bytes") or str(stored.get("path")).encode())
        shown = any(row[column] for column in columns)
        names.append(digest.hexdigest()[:16] if shown else str(index))
    return names


def _block(group: str) -> int:
    return int(hashlib.sha256(group.encode()).hexdigest(), 16) % BLOCKS
