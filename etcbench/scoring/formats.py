"""Read predictions in the formats that harnesses and official scripts write."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etcbench.errors import UsageError

Record = Mapping[str, Any]
_LETTERS = "ABCDE"
_SHEETS = (".xlsx", ".csv", ".tsv")


@dataclass(frozen=True)
class Prediction:
    """One answer of a predictions file.

    Attributes
    ----------
    key : str
        What names the question in the file.
    response : str or None
        The text; None where the file says that the sample failed.
    where : str
        File and line, for messages.
    prompt : str
        What the model read, where the file tells; it distinguishes questions that share a key.
    record : mapping or None
        The question with its gold answer, where the file carries it.
    row : int or None
        Number of the question's row in the data, where the file names it by that.
    """

    key: str
    response: str | None
    where: str
    prompt: str = ""
    record: Record | None = None
    row: int | None = None


def read_records(path: Path) -> Iterator[tuple[str, Record]]:
    """Read the records of a table or json file, each with its place.

    Takes parquet, csv, tsv, xlsx, json lines (a trailing comma is forgiven), a json list, a json
    object that holds one list of records, and a json object of records by id.

    Raises
    ------
    UsageError
        With file and line of the first bad row.
    """
    if path.suffix in _SHEETS or path.suffix == ".parquet":
        yield from _read_sheet(path)
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error}") from error
    except json.JSONDecodeError:
        yield from _read_lines(path)
        return
    if isinstance(content, Mapping):
        lists = [v for v in content.values() if isinstance(v, list) and v and _are_records(v)]
        if len(lists) == 1:
            content = lists[0]
        elif content and _are_records(content.values()):
            content = [{"id": key, **record} for key, record in content.items()]
        else:
            content = [content]
    if not isinstance(content, list):
        raise UsageError(f"{path} holds neither a list nor an object of records")
    content.reverse()
    for number in range(1, len(content) + 1):
        # a record that was turned into a sample need not stay: annotations are large
        record = content.pop()
        where = f"{path}, entry {number}"
        if not isinstance(record, Mapping):
            raise UsageError(f"{where}: not a record but {str(record)[:60]!r}")
        yield where, record


def _read_lines(path: Path) -> Iterator[tuple[str, Record]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            text = line.strip().removesuffix(",")
            if not text or text in "[]":
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(text)
            except json.JSONDecodeError as error:
                raise UsageError(f"{where}: not a json record: {error}") from error
            if not isinstance(record, Mapping):
                raise UsageError(f"{where}: not a record but {text[:60]!r}")
            yield where, record


def _read_sheet(path: Path) -> Iterator[tuple[str, Record]]:
    import pandas

    try:
        if path.suffix == ".parquet":
            frame = pandas.read_parquet(path)
        elif path.suffix == ".xlsx":
            frame = pandas.read_excel(path, keep_default_na=False)
        else:
            separator = "\t" if path.suffix == ".tsv" else ","
            frame = pandas.read_csv(
                path, sep=separator, keep_default_na=False, dtype=str, engine="python",
                quoting=csv.QUOTE_MINIMAL,
            )  # fmt: skip
    except ImportError as error:
        raise UsageError(f"reading {path} needs openpyxl; install it or export to csv") from error
    except (ValueError, OSError) as error:
        raise UsageError(f"{path} is not a readable sheet: {error}") from error
    for number, record in enumerate(frame.to_dict("records"), 2):
        yield f"{path}:{number}", {str(name): value for name, value in record.items()}


def _are_records(values: Iterable[Any]) -> bool:
    return all(isinstance(value, Mapping) for value in values)


def _field(record: Record, where: str, *names: str) -> Any:
    for name in names:
        if name in record:
            return record[name]
    raise UsageError(f"{where}: no field {names[0]!r}; it has {', '.join(map(str, record))}")


def _text(record: Record, where: str, *names: str) -> str:
    value = _field(record, where, *names)
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool | int | float):
        value = "" if value != value else str(value)
    if not isinstance(value, str):
        raise UsageError(f"{where}: {names[0]!r} is not text but {str(value)[:60]!r}")
    return value


# one reader per format


def _etcbench(path: Path) -> Iterator[Prediction]:
    for where, record in read_records(path):
        failed = record.get("status") == "error"
        response = None if failed else _text(record, where, "response")
        yield Prediction(_text(record, where, "id"), response, where)


def _llava(path: Path) -> Iterator[Prediction]:
    for where, record in read_records(path):
        key = _text(record, where, "question_id")
        response = _text(record, where, "text")
        yield Prediction(key, response, where, str(record.get("prompt") or ""))


def _vqa(path: Path) -> Iterator[Prediction]:
    for where, record in read_records(path):
        key = _text(record, where, "question_id", "questionId", "id")
        yield Prediction(key, _text(record, where, "answer", "prediction"), where)


def _lmms(path: Path) -> Iterator[Prediction]:
    for where, record in read_records(path):
        response = _text(record, where, "filtered_resps", "resps")
        key = _text(record, where, "doc_id")
        if "doc" in record:
            yield Prediction(key, response, where, record=record["doc"])
        elif key.isdigit():  # the command line leaves the sample out; its number is the row's
            yield Prediction(key, response, where, row=int(key))
        else:
            raise UsageError(f"{where}: doc_id {key!r} is not the number of a row")


def _seed(path: Path) -> Iterator[Prediction]:
    for where, record in read_records(path):
        key = _text(record, where, "question_id")
        gold = {**record, "answer": _text(record, where, "gt_answer")}
        yield Prediction(key, _text(record, where, "prediction"), where, record=gold)


def _qbench(path: Path) -> Iterator[Prediction]:
    for where, record in read_records(path):
        key = f"{_text(record, where, 'img_path')}|{_text(record, where, 'question')}"
        yield Prediction(key, _text(record, where, "response"), where, record=record)


def _sheet(path: Path) -> Iterator[Prediction]:
    for where, record in read_records(path):
        key = _text(record, where, "index")
        yield Prediction(key, _text(record, where, "prediction"), where, record=record)


def _refer(path: Path) -> Iterator[Prediction]:
    for where, record in read_records(path):
        yield Prediction(_text(record, where, "ref_id"), _text(record, where, "sent"), where)


def _scienceqa(path: Path) -> Iterator[Prediction]:
    for key, text in _object(path, "outputs").items():
        yield Prediction(key, str(text), f"{path}, problem {key}")


def _scienceqa_index(path: Path) -> Iterator[Prediction]:
    for key, index in _object(path, "results").items():
        where = f"{path}, problem {key}"
        if not isinstance(index, int) or index >= len(_LETTERS):
            raise UsageError(f"{where}: {index!r} is not the index of a choice")
        yield Prediction(key, _LETTERS[index] if index >= 0 else "", where)


def _object(path: Path, name: str) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))[name]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not a ScienceQA output with {name!r}: {error!r}") from error
    if not isinstance(found, Mapping):
        raise UsageError(f"{path}: {name!r} is not an object by problem id")
    return found


def _mme(path: Path) -> Iterator[Prediction]:
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
            if not line.strip():
                continue
            where, parts = f"{file}:{number}", line.rstrip("\r").split("\t", 3)
            if len(parts) < 4:
                raise UsageError(
                    f"{where}: {len(parts)} of 4 columns (image, question, answer, response)"
                )
            image, question, answer, response = parts
            key = f"{file.stem}/{image}"
            record = {
                "question_id": key, "question": question, "answer": answer, "category": file.stem,
            }  # fmt: skip
            yield Prediction(key, response, where, record=record)


FORMATS: dict[str, Callable[[Path], Iterator[Prediction]]] = {
    "etcbench": _etcbench,
    "llava": _llava,
    "lmms": _lmms,
    "mme": _mme,
    "qbench": _qbench,
    "refer": _refer,
    "scienceqa": _scienceqa,
    "scienceqa-index": _scienceqa_index,
    "seed": _seed,
    "sheet": _sheet,
    "vqa": _vqa,
}
_SIGNS = (
    ("lmms", {"doc_id", "doc"}),
    ("lmms", {"doc_id", "filtered_resps"}),
    ("etcbench", {"id", "response"}),
    ("qbench", {"img_path", "candidates", "response"}),
    ("seed", {"prediction", "gt_answer"}),
    ("llava", {"question_id", "text"}),
    ("refer", {"ref_id", "sent"}),
    ("vqa", {"question_id", "answer"}),
    ("vqa", {"questionId", "prediction"}),
    ("scienceqa", {"outputs", "results"}),
)


def recognise(path: Path) -> str:
    """Name the format of a predictions file by its ending or the fields of its first record."""
    if path.is_dir() or path.suffix == ".txt":
        return "mme"
    if path.suffix in _SHEETS:
        return "sheet"
    _, first = next(read_records(path), ("", {}))
    for name, fields in _SIGNS:
        if fields <= first.keys():
            return name
    raise UsageError(f"{path} is in no known format; name it with --format {'|'.join(FORMATS)}")
