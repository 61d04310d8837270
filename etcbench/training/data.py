"""Training samples addressed by number, and LLaVA's conversations as such a source.

A source has ``sample(index)`` for any index from 0 and depends on nothing but its seed, so that a
run continues exactly and two methods see the same samples in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from json import JSONDecodeError, JSONDecoder
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from etcbench.errors import UsageError

TAG = "<image>"
ASKER, ANSWERER = ("human", "user"), ("gpt", "assistant")
WINDOW = 50  # batches among which samples are sorted by length


class Indexed(Dataset):
    """The first ``length`` samples of an index-addressable stream, from ``start`` on."""

    def __init__(self, stream: Any, start: int, length: int) -> None:
        self.stream, self.start, self.length = stream, start, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.stream.sample(self.start + index)
        return {key: sample[key] for key in ("picture", "turns", "patch_names") if key in sample}


@dataclass
class Conversations:
    """Instruction data in LLaVA's format, e.g. LLaVA-v1.5-mix665k.

    A json list (or one json object per line) of ``{"id", "image", "conversations": [{"from":
    "human" or "gpt", "value"}, ...]}``. Samples without ``image`` are text only. ``<image>`` marks
    that the picture belongs to a conversation; wherever it stands, the picture goes in front of
    the first question, as in LLaVA's own training. The file is read once for an index; a sample
    is read when it is asked for.

    Parameters
    ----------
    file : Path
        The json file.
    images : Path or None
        Folder that ``image`` is relative to; default: that of the file.
    batch_size : int
        Samples of a step. Consecutive ones have a picture or not, all alike, and similar lengths.
    seed : int
        Seed of the order, which is another one in every pass over the data.
    group : bool
        False for a plain random order.
    missing : {"error", "skip"}
        Whether a picture that does not exist stops the training when it is needed, or its sample
        is left out from the start (``skipped`` counts them).

    Raises
    ------
    UsageError
        If the file does not exist or is not in this format; names the file and the sample.
    """

    file: Path
    images: Path | None = None
    batch_size: int = 1
    seed: int = 0
    group: bool = True
    missing: Literal["error", "skip"] = "error"
    skipped: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if not self.file.is_file():
            raise UsageError(f"training data {self.file} does not exist; name it with --data")
        if self.images is None:
            self.images = self.file.parent
        spans, words, pictured = [], [], []
        for begin, end, record in _records(self.file):
            if self.missing == "skip" and not self._has_picture(record):
                self.skipped += 1
                continue
            spans.append((begin, end))
            words.append(sum(len(text.split()) for _, text in _said(record, self.file)))
            pictured.append(record.get("image") is not None)
        if not spans:
            raise UsageError(f"{self.file} has no sample that can be used")
        self._spans = np.array(spans, dtype=np.int64)
        self._words, self._pictured = np.array(words), np.array(pictured)
        self._order: tuple[int, np.ndarray] | None = None

    @property
    def size(self) -> int:
        """Samples of one pass."""
        return len(self._spans)

    def sample(self, index: int) -> dict[str, Any]:
        """Read sample number ``index`` of the training order, passes one after the other.

        Returns
        -------
        dict
            ``picture``: RGB `PIL.Image.Image` or None; ``turns``: list of (question, answer).

        Raises
        ------
        UsageError
            If the sample or its picture cannot be read; names both.
        """
        epoch, place = divmod(index, self.size)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self._shuffled(epoch))
        begin, end = self._spans[self._order[1][place]]
        with self.file.open("rb") as stream:
            stream.seek(begin)
            record = json.loads(stream.read(end - begin))
        return {"picture": self._picture(record), "turns": _turns(record, self.file)}

    def _shuffled(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, epoch))
        if not self.group:
            return rng.permutation(self.size)
        return grouped_order(self._words, self._pictured, self.batch_size, rng)

    def _has_picture(self, record: Mapping[str, Any]) -> bool:
        name = record.get("image")
        assert self.images is not None
        return name is None or (isinstance(name, str) and (self.images / name).is_file())

    def _picture(self, record: Mapping[str, Any]) -> Image.Image | None:
        name = record.get("image")
        if name is None:
            return None
        where = f"{self.file}: sample {record.get('id')}"
        if not isinstance(name, str):
            raise UsageError(f"{where} has {len(name)} pictures; training takes one per sample")
        assert self.images is not None
        try:
            with Image.open(self.images / name) as picture:
                return picture.convert("RGB")
        except FileNotFoundError as error:
            raise UsageError(
                f"{where}: picture {name} is not in {self.images}; name the right folder with "
                "--images, or leave such samples out with --set missing_images=skip"
            ) from error
        except (UnidentifiedImageError, OSError) as error:
            raise UsageError(f"{where}: picture {name} cannot be read: {error}") from error


def grouped_order(
    words: np.ndarray, pictured: np.ndarray, batch_size: int, rng: np.random.Generator
) -> np.ndarray:
    """Order samples so that a batch holds one modality and similar lengths (spec abstractive 2.6).

    Each modality is shuffled, sorted by length inside windows of `WINDOW` batches and cut into
    batches, which are then shuffled; only what is left over of both modalities is mixed.

    Parameters
    ----------
    words : numpy.ndarray, int, shape (samples,)
        Length of each sample.
    pictured : numpy.ndarray, bool, shape (samples,)
        Whether it has a picture.
    batch_size : int
        Samples of a batch.
    rng : numpy.random.Generator
        Source of chance.

    Returns
    -------
    numpy.ndarray
        Every sample's number once.
    """
    batches: list[np.ndarray] = []
    rest: list[np.ndarray] = []
    for modality in (pictured, ~pictured):
        shuffled = rng.permutation(np.flatnonzero(modality))
        whole = len(shuffled) // batch_size * batch_size
        rest.append(shuffled[whole:])
        for begin in range(0, whole, WINDOW * batch_size):
            window = shuffled[begin : min(begin + WINDOW * batch_size, whole)]
            window = window[np.argsort(-words[window], kind="stable")]
            batches += list(window.reshape(-1, batch_size))
    order = [batches[number] for number in rng.permutation(len(batches))]
    return np.concatenate([*order, rng.permutation(np.concatenate(rest))]).astype(np.int64)


def _records(file: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield each sample with the bytes it stands at."""
    # Latin-1 has one character per byte, so places in the text are places in the file; nothing
    # but ASCII has a meaning in the grammar of json.
    text = file.read_bytes().decode("latin-1")
    decoder = JSONDecoder()
    listed = text.lstrip().startswith("[")
    at = text.index("[") + 1 if listed else 0
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        if at >= len(text) or text[at] == "]":
            return
        try:
            record, end = decoder.raw_decode(text, at)
        except JSONDecodeError as error:
            raise UsageError(f"{file} is not json at byte {error.pos}: {error.msg}") from error
        if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
            raise UsageError(
                f"{file}: sample at byte {at} has no list 'conversations'; LLaVA's format is "
                '{"id", "image", "conversations": [{"from", "value"}, ...]}'
            )
        yield at, end, record
        at = end


def _said(record: Mapping[str, Any], file: Path) -> list[tuple[bool, str]]:
    """Who speaks (True: the asker) and what, turn by turn."""
    said = []
    for turn in record["conversations"]:
        try:
            role, text = turn["from"], turn["value"]
        except (TypeError, KeyError) as error:
            raise UsageError(
                f"{file}: sample {record.get('id')}: a turn needs 'from' and 'value'"
            ) from error
        if role not in ASKER + ANSWERER or not isinstance(text, str):
            raise UsageError(
                f"{file}: sample {record.get('id')}: a turn is from human or gpt and has a text, "
                f"not from {role!r}"
            )
        said.append((role in ASKER, text))
    return said


def _turns(record: Mapping[str, Any], file: Path) -> list[tuple[str, str]]:
    """Pair questions with answers; what the answerer says first is left out, as in LLaVA."""
    said = _said(record, file)
    while said and not said[0][0]:
        said = said[1:]
    asks, answers = said[::2], said[1::2]
    where = f"{file}: sample {record.get('id')}"
    if not answers or not all(a for a, _ in asks) or any(a for a, _ in answers):
        raise UsageError(f"{where}: human and gpt do not take turns")
    if record.get("image") is None and any(TAG in text for _, text in asks):
        raise UsageError(f"{where}: has {TAG} in its text, but no picture")
    return [
        (ask.replace(TAG, "").strip(), answer.strip())
        for (_, ask), (_, answer) in zip(asks, answers, strict=False)
    ]
