"""From samples to answers: group by picture, share what the method allows, decode in batches.

Samples that show the same pictures form a group. A wave of groups is decoded together: each
picture is opened, preprocessed and encoded once, the part of the prefill that does not depend on
the question runs once per group, and the questions fan out from it. Nothing about the grouping,
the batch size or the order of the samples may change an answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from etcbench.backbones.base import Backbone, Prompt, Visual
from etcbench.compressor import Compressor
from etcbench.decoder import Decoder, KVState
from etcbench.doc import Doc, UnreadableImage
from etcbench.errors import UsageError
from etcbench.selection import Kind
from etcbench.task import Task

# Groups are formed among this many samples at a time, so memory does not grow with the data set.
WINDOW = 2048


@dataclass(frozen=True)
class Settings:
    """How to run; only ``style`` and ``max_new_tokens`` may change an answer.

    Attributes
    ----------
    batch_size : int
        Questions decoded together.
    style : str or None
        Prompt style; None for the benchmark's default.
    max_new_tokens : int or None
        Length limit; None for the benchmark's.
    reuse : bool
        Share a picture's work among its questions as far as the method allows.
    """

    batch_size: int = 16
    style: str | None = None
    max_new_tokens: int | None = None
    reuse: bool = True


@dataclass(frozen=True)
class Answer:
    """What became of one sample.

    Attributes
    ----------
    doc : Doc
        The sample.
    prompt : str
        User text that the model read.
    response : str or None
        Greedy answer; None after an error.
    entering : int
        Tokens through which the text sees the pictures: visual tokens entering the language
        model, or the learned tokens that replace them.
    layer_average : float
        Visual tokens at the layers' inputs, averaged over the layers.
    cached : float
        Visual and learned tokens in the KV cache after prefill, averaged over the layers.
    error : str or None
        Why there is no response.
    """

    doc: Doc
    prompt: str
    response: str | None
    entering: int = 0
    layer_average: float = 0.0
    cached: float = 0.0
    error: str | None = None


@dataclass(frozen=True)
class _Question:
    """A sample with its prompt, ready to be answered."""

    doc: Doc
    text: str
    prompt: Prompt
    pictures: tuple[str, ...]


@torch.inference_mode()
def answers(
    backbone: Backbone,
    compressor: Compressor,
    task: Task,
    docs: Iterable[Doc],
    settings: Settings | None = None,
) -> Iterator[list[Answer]]:
    """Answer samples, one finished batch at a time.

    An unreadable picture or a failure of the model becomes an `Answer` with ``error``; nothing is
    raised for a sample.

    Raises
    ------
    UsageError
        If the task has no such prompt style.
    """
    settings = settings or Settings()
    engine = _Engine(Decoder(backbone, compressor), task, settings)
    stream = iter(docs)
    while window := list(islice(stream, WINDOW)):
        questions = [engine.question(doc) for doc in window]
        for wave in _waves(questions, settings.batch_size):
            yield engine.answer(wave)


def _waves(questions: Sequence[_Question], size: int) -> Iterator[list[_Question]]:
    """Split into batches that keep the questions on the same pictures together, longest first."""
    groups: dict[tuple[str, ...], list[_Question]] = {}
    for question in questions:
        groups.setdefault(question.pictures or (question.doc.id,), []).append(question)

    def length(group: list[_Question]) -> tuple[int, int]:
        return len(group[0].pictures), max(len(question.prompt.after) for question in group)

    wave: list[_Question] = []
    for group in sorted(groups.values(), key=length, reverse=True):
        mixed = bool(wave) and len(wave[0].pictures) != len(group[0].pictures)
        if wave and (mixed or len(wave) + len(group) > size):
            yield wave
            wave = []
        for start in range(0, len(group), size):
            wave = wave + group[start : start + size]
            if len(wave) >= size:
                yield wave
                wave = []
    if wave:
        yield wave


@dataclass
class _Engine:
    decoder: Decoder
    task: Task
    settings: Settings

    @property
    def backbone(self) -> Backbone:
        return self.decoder.backbone

    @property
    def compressor(self) -> Compressor:
        return self.decoder.compressor

    def question(self, doc: Doc) -> _Question:
        text = self.task.prompt(doc, self.settings.style)
        pictures = doc.pictures if self.compressor.uses_image else ()
        prompt = self.backbone.prompt(text, len(pictures), self.compressor.prompt_layout)
        return _Question(doc, text, prompt, tuple(picture.key for picture in pictures))

    def answer(self, wave: list[_Question]) -> list[Answer]:
        """Answer a wave; after a failure halve it until the sample that fails stands alone."""
        try:
            return self._answer(wave)
        except UsageError:
            raise
        except Exception as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                torch.cuda.empty_cache()
            if len(wave) == 1:
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                if isinstance(error, UnreadableImage):
                    reason = f"unreadable image: {error}"
                return [Answer(wave[0].doc, wave[0].text, None, error=reason)]
        half = len(wave) // 2
        return self.answer(wave[:half]) + self.answer(wave[half:])

    def _answer(self, wave: list[_Question]) -> list[Answer]:
        groups = list(dict.fromkeys(question.pictures for question in wave))
        if not self.settings.reuse or not wave[0].pictures or self.compressor.reuse == "vision":
            kv, logits = self._apart(wave)
        else:
            members = [groups.index(question.pictures) for question in wave]
            kv, logits = self._shared(wave, members)
        counts = self._counts(kv)
        limit = self.settings.max_new_tokens or self.task.max_new_tokens
        ids = self.decoder.greedy(kv, logits, limit)
        return [
            Answer(q.doc, q.text, self.backbone.detokenize(row), *count)
            for q, row, count in zip(wave, ids, counts, strict=True)
        ]

    def _shared(self, wave: list[_Question], members: list[int]) -> tuple[KVState, Tensor]:
        """Prefill each distinct set of pictures once and fan out to the questions on it."""
        first = [members.index(group) for group in range(max(members) + 1)]
        leaders = [wave[number] for number in first]
        prefix = self.backbone.assemble(
            [q.prompt for q in leaders], self._visual(leaders), self.compressor.learned_tokens()
        )
        shared = self.decoder.share(prefix)
        index = torch.tensor(members, device=self.backbone.device)
        return self.decoder.question(shared.rows(index), [q.prompt.after for q in wave])

    def _apart(self, wave: list[_Question]) -> tuple[KVState, Tensor]:
        """Prefill every question with its own copy of the pictures, in one pass.

        Sharing visual tokens or the tower's output, not the prefix, is left to `_visual`.
        """
        prefix = self.backbone.assemble(
            [q.prompt for q in wave], self._visual(wave), self.compressor.learned_tokens()
        )
        return self.decoder.whole(prefix, [q.prompt.after for q in wave])

    def _visual(self, wave: list[_Question]) -> list[Visual]:
        """Open, preprocess and encode the pictures: entry ``i`` holds every row's ``i``-th."""
        visual = []
        for number in range(len(wave[0].pictures)):
            keys = [q.pictures[number] for q in wave]
            distinct = list(dict.fromkeys(keys)) if self.settings.reuse else keys
            chosen = [wave[keys.index(key)].doc.pictures[number].open() for key in distinct]
            pixels = self.backbone.preprocess(chosen, distinct)
            shared = [distinct.index(key) for key in keys]
            rows = shared if self.settings.reuse else range(len(wave))
            asked = [(row, q.text) for row, q in zip(rows, wave, strict=True)]
            visual.append(self.backbone.visual(pixels, self.compressor, asked))
        return visual

    @staticmethod
    def _counts(kv: KVState) -> list[tuple[int, float, float]]:
        """Per row: tokens that stand for the pictures, layer average, cached average."""
        entered = torch.stack([count for count in kv.entered if count is not None]).float()
        seen, cached = [], []
        for layout in kv.layouts:
            assert layout is not None
            learned = layout.is_kind(Kind.LEARNED).sum(-1)
            visual = layout.is_kind(Kind.VISUAL).sum(-1)
            cached.append(learned + visual)
            seen.append(torch.where(learned > 0, learned, entered[0].long()))
        return list(
            zip(
                seen[0].tolist(),
                entered.mean(0).tolist(),
                torch.stack(cached).float().mean(0).tolist(),
                strict=True,
            )
        )
