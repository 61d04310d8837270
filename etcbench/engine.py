"""From samples to answers: group by picture, share what the method allows, decode in batches.

Samples that show the same pictures form a group. A wave of groups is decoded together: each
picture is opened, preprocessed and encoded once, the part of the prefill that does not depend on
the question runs once per group, and the questions fan out from it. Prefixes are kept for groups
larger than a wave and for pictures that come again. Nothing about the grouping, the batch size,
the memory at hand or the order of the samples may change an answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size

from etcbench.backbones.base import Backbone, Visual
from etcbench.backbones.stream import Stream
from etcbench.compressor import Compressor
from etcbench.console import notice
from etcbench.decoder import Decoder, KVState
from etcbench.doc import Doc, Picture
from etcbench.errors import UsageError
from etcbench.growing import ROOM
from etcbench.kv import Shared
from etcbench.pictures import Opened, PictureThreads, open_pictures
from etcbench.prefixes import BatchCache, fan_out
from etcbench.selection import Kind
from etcbench.speculative import Drafts, decode
from etcbench.states import VisionStates
from etcbench.task import Task
from etcbench.waves import Question, common_opening, waves

# Groups are formed among this many samples at a time, so memory does not grow with the data set.
WINDOW = 2048
# The text behind the pictures is shared where all questions begin with so many equal tokens.
OPENING = 8


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
    workers : int
        Threads that open pictures for the next batches; 0: none is opened ahead.
    cache_mib : int
        MiB of prefilled prefixes kept for pictures that come again.
    """

    batch_size: int = 16
    style: str | None = None
    max_new_tokens: int | None = None
    reuse: bool = True
    workers: int = 2
    cache_mib: int = 1024


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
    drafts : Drafts or None
        What became of speculative drafts, where the method brings them.
    """

    doc: Doc
    prompt: str
    response: str | None
    entering: int = 0
    layer_average: float = 0.0
    cached: float = 0.0
    error: str | None = None
    drafts: Drafts | None = None


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
    with PictureThreads(backbone, settings.workers) as threads:
        engine = _Engine(Decoder(backbone, compressor), task, settings, threads)
        for wave in engine.waves(docs):
            engine.prepare(wave)
            if len(engine.waiting) > settings.workers:
                yield engine.next()
        while engine.waiting:
            yield engine.next()


@dataclass
class _Waiting:
    """A wave whose pictures are being opened."""

    wave: list[Question]
    opened: Callable[[], Opened]


class _Engine:
    def __init__(
        self, decoder: Decoder, task: Task, settings: Settings, threads: PictureThreads
    ) -> None:
        self.decoder, self.task, self.settings = decoder, task, settings
        self.backbone, self.compressor = decoder.backbone, decoder.compressor
        self.threads = threads
        self.size = settings.batch_size
        self.prefixes: BatchCache[Shared] = BatchCache(settings.cache_mib << 20)
        self.seen: BatchCache[VisionStates] = BatchCache(settings.cache_mib << 20)
        self.waiting: deque[_Waiting] = deque()
        self.opening: tuple[int, ...] | None = None

    # What is answered together ----------------------------------------------------------------

    def waves(self, docs: Iterable[Doc]) -> Iterator[list[Question]]:
        """Ask the samples in batches, window by window."""
        stream = iter(docs)
        while window := [self.question(doc) for doc in islice(stream, WINDOW)]:
            if self.settings.reuse and self.compressor.reuse == "prefix":
                window = self._opened_alike(window)
            yield from waves(window, lambda: self.size)

    def _opened_alike(self, window: list[Question]) -> list[Question]:
        """Set apart what all questions begin with, where it is long enough to pay."""
        self.opening = common_opening(window, self.opening)
        if self.opening is None or len(self.opening) < OPENING:
            return window
        return [replace(q, opening=self.opening) if q.shown else q for q in window]

    def question(self, doc: Doc) -> Question:
        """Render and tokenize a sample."""
        text = self.task.prompt(doc, self.settings.style)
        shown = doc.pictures if self.compressor.uses_image else ()
        prompt = self.backbone.prompt(text, len(shown), self.compressor.prompt_layout)
        return Question(doc, text, prompt, shown)

    def prepare(self, wave: list[Question]) -> None:
        """Put a wave in the queue and start to open those of its pictures that will be needed."""
        coming = self._coming()
        new = [q for q in wave if (key := self._key(q)) is None or key not in coming]
        self.waiting.append(_Waiting(wave, self.threads.ahead(self._unseen(new))))

    def next(self) -> list[Answer]:
        """Answer the wave that has waited longest."""
        first = self.waiting.popleft()
        answered = self.answer(first.wave, first.opened)
        self._kept.trim(self._coming())
        return answered

    def _coming(self) -> set[Hashable]:
        """List what the waves in the queue will look for."""
        return {self._key(q) for waiting in self.waiting for q in waiting.wave}

    def answer(
        self, wave: list[Question], opened: Callable[[], Opened] | None = None
    ) -> list[Answer]:
        """Answer a wave; after a failure halve it until the sample that fails stands alone."""
        if len(wave) > self.size:
            parts = [wave[start : start + self.size] for start in range(0, len(wave), self.size)]
            return [answer for part in parts for answer in self.answer(part)]
        try:
            return self._answer(wave, opened)
        except UsageError:
            raise
        except Exception as error:
            if out_of_memory(error):
                self._make_room(len(wave))
            if len(wave) == 1:
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                return [Answer(wave[0].doc, wave[0].text, None, error=reason)]
        half = (len(wave) + 1) // 2
        return self.answer(wave[:half]) + self.answer(wave[half:])

    def _make_room(self, questions: int) -> None:
        """Drop what is only kept for later; remember a size that fits, halved, for later waves."""
        self._kept.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        size = (questions + 1) // 2
        if size < min(self.size, questions):
            self.size = size
            notice(f"memory ran out with {questions} questions at once; going on with {size}")

    def _answer(self, wave: list[Question], opening: Callable[[], Opened] | None) -> list[Answer]:
        unseen = self._unseen(wave)
        opened = Opened() if opening is None else opening()
        if not opened.has(unseen):
            opened = open_pictures(self.backbone, unseen)
        failed, fine = [], []
        for question in wave:
            errors = [opened.unreadable.get(name) for name in self._names(question)]
            if error := next(filter(None, errors), None):
                reason = f"unreadable image: {error}"
                failed.append(Answer(question.doc, question.text, None, error=reason))
            else:
                fine.append(question)
        return (self._decode(fine, opened) if fine else []) + failed

    def _decode(self, wave: list[Question], opened: Opened) -> list[Answer]:
        limit = self.settings.max_new_tokens or self.task.max_new_tokens
        if self._key(wave[0]) is not None and self.compressor.reuse != "vision":
            after = [question.rest for question in wave]
            room = max(map(len, after)) + min(limit, ROOM)
            kv, logits = self.decoder.question(self._prefixes(wave, opened, room), after)
        else:
            after = [question.prompt.after for question in wave]
            kv, logits = self.decoder.whole(self._assembled(wave, opened), after)
        counts = self._counts(kv)
        decoded = decode(self.decoder, kv, logits, limit)
        return [
            Answer(q.doc, q.text, self.backbone.detokenize(row.tokens), *count, drafts=row.drafts)
            for q, row, count in zip(wave, decoded, counts, strict=True)
        ]

    # What is shared ---------------------------------------------------------------------------

    def _key(self, question: Question) -> Hashable:
        """Name what questions on the same pictures share; None where they share nothing."""
        if not self.settings.reuse or not question.shown:
            return None
        return question.pictures if self.compressor.reuse == "vision" else question.prefix

    @property
    def _kept(self) -> BatchCache[Any]:
        """Where that is kept."""
        return self.seen if self.compressor.reuse == "vision" else self.prefixes

    def _prefixes(self, wave: list[Question], opened: Opened, room: int) -> Shared:
        """Prefill each distinct prefix that is not there yet and fan out to the questions."""
        new = {q.prefix: q for q in wave if q.prefix not in self.prefixes}
        if new:
            prefix = self._assembled(list(new.values()), opened)
            shared = self.decoder.share(prefix)
            if opening := wave[0].opening:
                # A compressed prefix is complete: text of every question goes on from it once.
                shared = Shared(self.decoder.question(shared, [opening] * len(new))[0])
            self.prefixes.add(list(new), shared, shared.bytes())
        return fan_out(*self.prefixes.find([q.prefix for q in wave]), room)

    def _assembled(self, wave: list[Question], opened: Opened) -> Stream:
        """Lay out what stands in front of the questions' own text."""
        prompts = [question.prompt for question in wave]
        return self.backbone.assemble(
            prompts, self._visual(wave, opened), self.compressor.learned_tokens()
        )

    def _visual(self, wave: list[Question], opened: Opened) -> list[Visual]:
        """Encode the pictures: entry ``i`` holds every row's ``i``-th."""
        slots = len(wave[0].shown)
        if not slots:
            return []
        asked = [
            (self._names(question)[slot], question.text)
            for slot in range(slots)
            for question in wave
        ]
        visual = self._looked(asked, opened) if self.compressor.reuse == "vision" else None
        if visual is None:
            assert opened.pixels is not None
            numbered = [(opened.place[name], text) for name, text in asked]
            visual = self.backbone.visual(opened.pixels, self.compressor, numbered)
        rows = torch.arange(len(asked), device=self.backbone.device).view(slots, -1)
        return [visual.rows(row) for row in rows] if slots > 1 else [visual]

    def _looked(self, asked: list[tuple[str, str]], opened: Opened) -> Visual | None:
        """Visual tokens for questions on pictures that the tower looks at once."""
        if not self.settings.reuse:
            return None
        if opened.pixels is not None:
            vision = self.backbone.look(opened.pixels, self.compressor)
            # The tower's inner states may be asked for later, so they are held too.
            size = vision.features.nbytes * (self.backbone.spec.tower_layers + 2)
            self.seen.add([(name,) for name in opened.place], vision, size)
        batches, places = self.seen.find([(name,) for name, _ in asked])
        parts, order = [], []
        for number, batch in enumerate(batches):
            own = [n for n, (which, _) in enumerate(places) if which == number]
            numbered = [(places[n][1], asked[n][1]) for n in own]
            parts.append(self.backbone.visual(batch, self.compressor, numbered))
            order += own
        visual = parts[0] if len(parts) == 1 else Visual.stack(parts)
        back = torch.tensor(order, device=self.backbone.device).argsort()
        return visual.rows(back)

    def _names(self, question: Question) -> tuple[str, ...]:
        """Names to open the pictures under; without reuse no two samples share one."""
        if self.settings.reuse:
            return question.pictures
        return tuple(f"{question.doc.id} {slot}" for slot in range(len(question.shown)))

    def _unseen(self, wave: list[Question]) -> dict[str, Picture]:
        """Pictures that have to be opened, each once."""
        return {
            name: picture
            for question in wave
            if (key := self._key(question)) is None or key not in self._kept
            for name, picture in zip(self._names(question), question.shown, strict=True)
        }

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


def out_of_memory(error: Exception) -> bool:
    """Whether a failure means that a smaller batch may do, on an accelerator or the CPU."""
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    # torch's CPU allocator raises a plain RuntimeError, worded by the system
    return should_reduce_batch_size(error) or "not enough memory" in str(error)
