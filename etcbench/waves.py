"""Samples as questions, and which of them are answered together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

from etcbench.backbones.base import Prompt
from etcbench.doc import Doc, Picture


@dataclass(frozen=True)
class Question:
    """A sample with its prompt, ready to be answered.

    Attributes
    ----------
    doc : Doc
        The sample.
    text : str
        User text that the model reads.
    prompt : Prompt
        Its tokens.
    shown : tuple of Picture
        The pictures that the method looks at.
    opening : tuple of int
        Tokens behind the pictures that are the same for every question asked with this one.
    """

    doc: Doc
    text: str
    prompt: Prompt
    shown: tuple[Picture, ...]
    opening: tuple[int, ...] = ()

    @property
    def pictures(self) -> tuple[str, ...]:
        """Identity of each picture."""
        return tuple(picture.key for picture in self.shown)

    @property
    def prefix(self) -> PrefixKey:
        """Identity of everything up to the last visual or learned token, and of the opening."""
        return self.pictures, self.prompt.chunks, (*self.prompt.bridge, -1, *self.opening)

    @property
    def rest(self) -> tuple[int, ...]:
        """Tokens behind the opening."""
        return self.prompt.after[len(self.opening) :]


PrefixKey = tuple[tuple[str, ...], tuple[tuple[int, ...], ...], tuple[int, ...]]


def common_opening(
    questions: Sequence[Question], known: tuple[int, ...] | None
) -> tuple[int, ...] | None:
    """Find the tokens with which the text behind the pictures always begins.

    VoCo's order of the prompt puts the system text there. Every question keeps a token of its own.

    Parameters
    ----------
    questions : sequence of Question
        Asked in one go.
    known : tuple of int, optional
        What others before them began with. It can only become shorter, so it settles after a few
        batches; what was kept behind a longer one is prefilled again.
    """
    texts = [question.prompt.after[:-1] for question in questions if question.shown]
    if known is not None:
        texts.append(known)
    if not texts:
        return None
    same = takewhile(lambda here: len({*here}) == 1, zip(*texts, strict=False))
    return tuple(token for token, *_ in same)


def waves(questions: Sequence[Question], size: Callable[[], int]) -> Iterator[list[Question]]:
    """Split into batches that keep the questions on the same pictures together, longest first.

    Parameters
    ----------
    questions : sequence of Question
        In any order.
    size : callable
        Questions of a batch at most; it may become less on the way.
    """
    groups: dict[object, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.pictures or question.doc.id, []).append(question)

    def length(group: list[Question]) -> tuple[int, int]:
        return len(group[0].shown), max(len(question.prompt.after) for question in group)

    wave: list[Question] = []
    for group in sorted(groups.values(), key=length, reverse=True):
        mixed = bool(wave) and len(wave[0].shown) != len(group[0].shown)
        if wave and (mixed or len(wave) + len(group) > size()):
            yield wave
            wave = []
        left = sorted(group, key=lambda question: len(question.prompt.after), reverse=True)
        while left:
            room = max(size() - len(wave), 1)
            wave, left = wave + left[:room], left[room:]
            if len(wave) >= size():
                yield wave
                wave = []
    if wave:
        yield wave
