"""Score a predictions file alone."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from etcbench.doc import Doc, Row
from etcbench.errors import UsageError, unknown_name
from etcbench.loading import load_task, make_task
from etcbench.scoring.formats import FORMATS, Prediction, read_records, recognise
from etcbench.task import Report, Task


def score_file(
    task: str | Task,
    predictions: str | Path,
    gold: str | Path | None = None,
    format: str | None = None,
    mode: str | None = None,
    data: str | Path | None = None,
    split: str | None = None,
    limit: int | None = None,
) -> Report:
    """Score a predictions file.

    Parameters
    ----------
    task : str or Task
        E.g. ``"mme"`` or ``"scienceqa_full"``.
    predictions : str or Path
        A file or, for MME, the result folder.
    gold : str or Path, optional
        Gold answers in the benchmark's official format or in the hub's columns. Needed, unless
        the predictions carry their gold answers or `data` is given.
    format : str, optional
        One of `FORMATS`; recognised from the file if absent.
    mode : str, optional
        Rule set of the benchmark.
    data, split, limit
        Take the questions from here, as in `etcbench.loading.load_task`, instead of from `gold`.

    Raises
    ------
    UsageError
        For an unreadable file, a bad row (with file and line), an answer to an unknown question,
        two answers to one question, or missing gold answers.
    """
    task = make_task(task) if isinstance(task, str) else task
    with _collector_paused():
        return _score_file(task, Path(predictions), gold, format, mode, data, split, limit)


def _score_file(
    task: Task,
    path: Path,
    gold: str | Path | None,
    format: str | None,
    mode: str | None,
    data: str | Path | None,
    split: str | None,
    limit: int | None,
) -> Report:
    if not path.exists():
        raise UsageError(f"predictions {path} do not exist")
    name = format or recognise(path)
    if name not in FORMATS:
        raise unknown_name("format", name, FORMATS)
    answers = list(FORMATS[name](path))
    if not answers:
        raise UsageError(f"{path} holds no predictions")

    skipped: set[str] = set()
    if gold is not None:
        docs, skipped = _gold(task, Path(gold))
        if not docs:
            raise UsageError(f"{gold} holds no question of {task.name}")
    elif data is not None:
        docs = list(load_task(task, data, split=split, limit=limit).docs)
    elif all(answer.record is not None for answer in answers):
        docs, answers = _carried(task, answers, path)
    else:
        raise UsageError(
            f"{path} carries no gold answers; give --gold FILE (official format) or --data"
        )
    answers = [_by_row(task, docs, a) for a in answers if a.key not in skipped]
    responses = _join(task, docs, answers, last_counts=name == "refer")
    pairs = [(doc, responses.get(i)) for i, doc in enumerate(docs)]
    report = task.score(pairs, mode)
    if missing := len(docs) - len(responses):
        note = f"{missing} of {len(docs)} samples have no prediction and count as wrong"
        report = replace(report, notes=(*report.notes, note))
    return report


# questions, and which answer belongs to which


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Millions of records without a cycle: looking for one costs a third of the time."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def _gold(task: Task, path: Path) -> tuple[list[Doc], set[str]]:
    """Questions of a gold file, and the ids of those that this benchmark does not score."""
    if not path.is_file():
        raise UsageError(f"gold file {path} does not exist")
    docs, skipped = [], set()
    for index, (where, record) in enumerate(read_records(path)):
        row = _official(task, record, path, where)
        if row is None:
            skipped.add(str(record.get("id")))
        else:
            docs.append(_doc(task, row, index, where))
    return docs, skipped


def _carried(
    task: Task, answers: list[Prediction], path: Path
) -> tuple[list[Doc], list[Prediction]]:
    """Questions from the predictions themselves, and the answers under the questions' own ids."""
    docs, kept = [], []
    for index, answer in enumerate(answers):
        row = _official(task, answer.record or {}, path, answer.where)
        if row is not None:
            docs.append(_doc(task, row, index, answer.where))
            kept.append(replace(answer, key=docs[-1].id))
    return docs, kept


def _by_row(task: Task, docs: list[Doc], answer: Prediction) -> Prediction:
    """Name the question of an answer that only tells the number of its row."""
    if answer.row is None:
        return answer
    if answer.row >= len(docs):
        raise UsageError(f"{answer.where}: {task.name} has no row {answer.row} of {len(docs)}")
    return replace(answer, key=docs[answer.row].id)


def _official(task: Task, record: Row, path: Path, where: str) -> Row | None:
    try:
        return task.from_official(record, path)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise UsageError(f"{where}: not a {task.name} record: {error!r}") from error


def _doc(task: Task, row: Row, index: int, where: str) -> Doc:
    try:
        return task.doc(row, index)
    except KeyError as error:
        raise UsageError(f"{where}: no field {error}; it has {', '.join(map(str, row))}") from error
    except (ValueError, TypeError) as error:
        raise UsageError(f"{where}: not a {task.name} record: {error}") from error


def _join(
    task: Task, docs: list[Doc], answers: list[Prediction], last_counts: bool
) -> dict[int, str | None]:
    """Find the question of each answer; by its key and, where questions share it, its prompt."""
    places: dict[str, list[int]] = {}
    for i, doc in enumerate(docs):
        names = (doc.fields.get("question_id"), doc.fields.get("image_id"))
        for key in {doc.id, *(str(name) for name in names if name is not None)}:
            places.setdefault(key, []).append(i)
    found: dict[int, str | None] = {}
    source: dict[int, str] = {}
    for answer in answers:
        candidates = places.get(task.key(answer.key), [])
        if not candidates:
            raise UsageError(f"{answer.where}: {task.name} has no question {answer.key!r}")
        if len(candidates) > 1 and answer.prompt:
            fits = {i: _fit(task, docs[i], answer.prompt.lower()) for i in candidates}
            candidates = [i for i in candidates if fits[i] == max(fits.values())]
        free = [i for i in candidates if i not in found]
        if not free and not last_counts:
            before = source[candidates[-1]]
            raise UsageError(
                f"{answer.where}: question {answer.key!r} was answered before, at {before}"
            )
        place = free[0] if free else candidates[-1]
        found[place], source[place] = answer.response, answer.where
    return found


def _fit(task: Task, doc: Doc, prompt: str) -> int:
    """Length of the longest of a question's prompts that `prompt` contains."""
    own = (task.prompt(doc, style).lower() for style in task.styles)
    return max((len(text) for text in own if text in prompt), default=0)
