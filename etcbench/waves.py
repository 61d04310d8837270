"""Samples as questions, and which of them are answered together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

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
    """

    doc: Doc
    text: str
    prompt: Prompt
    shown: tuple[Picture, ...]

    @property
    def pictures(self) -> tuple[str, ...]:
        """Identity of each picture."""
        return tuple(picture.key for picture in self.shown)

    @property
    def prefix(self) -> PrefixKey:
        """Identity of everything up to the last visual or learned token."""
        return self.pictures, self.prompt.chunks, self.prompt.bridge


PrefixKey = tuple[tuple[str, ...], tuple[tuple[int, ...], ...], tuple[int, ...]]


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
