"""etcbench as a model of lmms-eval: ``lmms-eval --model etcbench --model_args method=...``.

lmms-eval asks, our engine answers: questions on the same picture share its work as far as the
method allows, and answers do not depend on the batch size.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from loguru import logger

from etcbench import registry
from etcbench.backbones import load_backbone
from etcbench.checkpoints import installed
from etcbench.console import progress
from etcbench.engine import Settings, answers
from etcbench.errors import UsageError
from etcbench.lmms.samples import Decoding, sample
from etcbench.options import typed_options
from etcbench.run import load_compressor
from etcbench.task import Doc, Task


@dataclass(frozen=True)
class _Asked:
    """One request; ``content`` is ``doc_to_visual`` or ``doc_to_messages`` (spec tasks 6.2)."""

    context: str
    content: Any
    number: int
    task: str
    split: str
    decoding: Decoding


class _Questions(Task):
    """The prompts of lmms-eval, as they come."""

    name = "lmms-eval"

    def render(self, doc: Doc, style: str) -> str:
        return doc.fields["text"]


class EtcbenchSimple(lmms):
    """Answers text and pictures given apart.

    Parameters
    ----------
    model : str, optional
        Embedded model, directory or hub id; default: the embedded micro model.
    method : str
        Compression method.
    tokens : int or str, optional
        Budget, e.g. ``1`` or ``kept:64``.
    checkpoint : str, optional
        Weights of a trained method.
    untrained : bool
        Run a trained method with random weights.
    seed : int
        Seed of random weights and random methods.
    device, dtype, attention : str, optional
        See `load_backbone`.
    reuse : bool
        Share a picture's work among its questions.
    batch_size : int or str
        Questions answered together.
    max_batch_size : int, optional
        Belongs to lmms-eval's ``auto`` batch size, which is not supported.
    **options
        Options of the method (``layer=3``) and of the model's family (``image=processor``).

    Raises
    ------
    UsageError
        If a name, budget, option or checkpoint is wrong.
    """

    is_simple = True

    def __init__(
        self,
        model: str | None = None,
        method: str = "full",
        tokens: int | str | None = None,
        checkpoint: str | None = None,
        untrained: bool = False,
        seed: int = 0,
        device: str | None = None,
        dtype: str | None = None,
        attention: str = "sdpa",
        reuse: bool = True,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise UsageError(
                f"batch size {batch_size!r} is not a number of questions; give 1 or more"
            )
        self._batch_size, self._reuse = int(batch_size), reuse
        kind = registry.load("baselines", method)
        own = {field.name for field in fields(kind) if field.init and field.name != "budget"}
        texts = {name: str(value) for name, value in options.items()}
        of_model = {name: value for name, value in texts.items() if name not in own}
        of_method = {name: value for name, value in texts.items() if name in own}
        self._backbone = load_backbone(
            model, device=_own_device(device), dtype=dtype, attention=attention, **of_model
        )
        self._compressor = load_compressor(
            method,
            tokens if tokens is None else str(tokens),
            self._backbone,
            checkpoint=checkpoint,
            untrained=untrained,
            seed=seed,
            **typed_options({method: kind}, of_method)[method],
        ).compressor

    @property
    def device(self) -> torch.device:
        """Where the model is; lmms-eval gathers results there."""
        return self._backbone.device

    @property
    def batch_size(self) -> int:
        """Questions answered together."""
        return self._batch_size

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answer every request greedily, in the order of the requests."""
        asked = [self._asked(request.args) for request in requests]
        responses: dict[int, str] = {}
        for decoding in dict.fromkeys(question.decoding for question in asked):
            chosen = [n for n, question in enumerate(asked) if question.decoding == decoding]
            docs = (self._doc(str(number), asked[number]) for number in chosen)
            for number, response in self._answers(docs, decoding, len(chosen)):
                responses[number] = decoding.cut(response)
        return [responses[number] for number in range(len(asked))]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Refuse: etcbench scores what a model says, not how likely it finds an answer."""
        raise UsageError(f"{_names(requests)}: etcbench answers generate_until tasks only")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Refuse: every question is a conversation of its own."""
        raise UsageError(f"{_names(requests)}: etcbench answers single questions only")

    def _asked(self, arguments: tuple[Any, ...]) -> _Asked:
        """Name the parts of a request."""
        context, settings, doc_to_visual, number, task, split = arguments
        return _Asked(context, doc_to_visual, number, task, split, Decoding.read(settings, task))

    def _read(self, asked: _Asked) -> tuple[str, Sequence[Any]]:
        """Text and pictures of a request."""
        return asked.context, asked.content(self._row(asked)) or ()

    def _row(self, asked: _Asked) -> Any:
        return self.task_dict[asked.task][asked.split][asked.number]

    def _doc(self, name: str, asked: _Asked) -> Doc:
        text, pictures = sample(partial(self._read, asked), asked.task)
        return Doc(name, f"{asked.task} {asked.number}", pictures, {"text": text}, None)

    def _answers(
        self, docs: Iterator[Doc], decoding: Decoding, total: int
    ) -> Iterator[tuple[int, str]]:
        settings = Settings(self._batch_size, None, decoding.max_new_tokens, self._reuse)
        method, model = self._compressor, self._backbone
        failed = 0
        with progress(method.name(), total) as advance, installed(method, model):
            for batch in answers(model, method, _Questions(), docs, settings):
                for answer in batch:
                    if answer.response is None:
                        failed += 1
                        logger.error(f"{answer.doc.group}: {answer.error}")
                    yield int(answer.doc.id), answer.response or ""
                advance(len(batch))
        if failed:
            logger.error(f"{failed} of {total} samples failed; lmms-eval scores them as empty")


class EtcbenchChat(EtcbenchSimple):
    """Answers messages: one user turn, its pictures in front of its text."""

    is_simple = False

    def _asked(self, arguments: tuple[Any, ...]) -> _Asked:
        context, doc_to_messages, settings, number, task, split = arguments
        return _Asked(context, doc_to_messages, number, task, split, Decoding.read(settings, task))

    def _read(self, asked: _Asked) -> tuple[str, Sequence[Any]]:
        messages = asked.content(self._row(asked))
        if len(messages) != 1 or messages[0]["role"] != "user":
            raise UsageError(
                f"lmms-eval task {asked.task} has {len(messages)} messages; etcbench answers one "
                "user turn: add --force_simple"
            )
        parts = messages[0]["content"]
        text = [part for part in parts if part["type"] == "text"]
        if parts[len(parts) - len(text) :] != text:
            raise UsageError(
                f"lmms-eval task {asked.task} places pictures inside its text; etcbench shows "
                "them in front: add --force_simple"
            )
        pictures = [part["url"] for part in parts if part["type"] != "text"]
        return "".join(part["text"] for part in text), pictures


def _names(requests: Sequence[Instance]) -> str:
    return ", ".join(sorted({f"lmms-eval task {request.task_name}" for request in requests}))


def _own_device(device: str | None) -> str | None:
    """Give each process of a distributed run its own GPU."""
    if device in (None, "cuda") and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return device
