"""What both directions share: lmms-eval's pictures, question texts and generation settings."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from etcbench.doc import Picture, UnreadableImage
from etcbench.errors import UsageError

Read = Callable[[], tuple[str, Sequence[Any]]]

# The limit that lmms-eval's own models take when a task names none.
MAX_NEW_TOKENS = 1024
# A task without stop strings gets this one, which few models obey (spec tasks 5, "Generic").
DELIMITER = "\n\n"
_GREEDY = {"do_sample": False, "temperature": 0, "num_beams": 1, "repetition_penalty": 1}
# Without effect on greedy answers, or on how other models cut a picture into tiles.
_IDLE = {"top_p", "top_k", "seed", "image_aspect_ratio", "skip_special_tokens"}
_PICTURE_FILES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tiff", ".webp"}
_UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Decoding:
    """How a task wants its answers generated.

    Attributes
    ----------
    max_new_tokens : int
        Length limit.
    stops : tuple of str
        Strings that end an answer.
    """

    max_new_tokens: int = MAX_NEW_TOKENS
    stops: tuple[str, ...] = ()

    @classmethod
    def read(cls, settings: Mapping[str, Any] | None, task: str) -> Decoding:
        """Read ``generation_kwargs``.

        Raises
        ------
        UsageError
            If the task wants anything but greedy decoding, or a setting is not known.
        """
        settings = dict(settings or {})
        limit = settings.pop("max_new_tokens", None) or MAX_NEW_TOKENS
        until = settings.pop("until", None) or ()
        stops = [until] if isinstance(until, str) else until
        for name, value in settings.items():
            if name in _IDLE or (name in _GREEDY and value in (None, _GREEDY[name])):
                continue
            if name == "temperature" and settings.get("do_sample") is False:
                continue
            if name in _GREEDY:
                raise UsageError(
                    f"lmms-eval task {task} sets {name}={value}; etcbench decodes greedily: "
                    "override it with --gen_kwargs or choose a task that decodes greedily"
                )
            raise UsageError(f"lmms-eval task {task} sets {name}, which etcbench does not know")
        return cls(int(limit), tuple(stop for stop in stops if stop != DELIMITER))

    def cut(self, answer: str) -> str:
        """Shorten an answer to what stands before the first stop string."""
        for stop in self.stops:
            answer = answer.partition(stop)[0]
        return answer


@dataclass(frozen=True)
class DrawnPicture(Picture):
    """A picture that is drawn anew when it is needed: waiting samples hold no pixels.

    Attributes
    ----------
    read : callable
        Gives the sample's text and all its pictures.
    number : int
        Which of them this is.
    digest : str
        Identity, from the first time it was drawn.
    """

    data: bytes = b""
    read: Read = lambda: ("", ())
    number: int = 0
    digest: str = ""

    @cached_property
    def key(self) -> str:
        """Identity of the content."""
        return self.digest

    @cached_property
    def size(self) -> tuple[int, int] | None:
        """Not known before it is drawn again."""
        return None

    def open(self) -> Image.Image:
        """Draw it, in RGB."""
        try:
            images = self.read()[1]
        except _UNREADABLE as error:
            raise UnreadableImage(str(error)) from error
        return _loaded(images[self.number]).open()


def sample(read: Read, task: str) -> tuple[str, tuple[Picture, ...]]:
    """Read a sample's question and pictures, without keeping the pixels.

    A sample that cannot be read gets a picture that fails when the engine opens it.

    Parameters
    ----------
    read : callable
        Gives the text and the pictures as lmms-eval has them.
    task : str
        Name for messages.

    Raises
    ------
    UsageError
        If the sample shows something else than pictures, or not in front of its text.
    """
    try:
        text, images = read()
    except _UNREADABLE as error:
        digest = hashlib.sha256(repr(error).encode()).hexdigest()
        return "", (DrawnPicture(read=read, digest=digest),)
    for image in images:
        if not isinstance(image, Image.Image) and not _is_picture_file(image):
            raise UsageError(
                f"lmms-eval task {task} shows a {type(image).__name__}; etcbench reads pictures, "
                "not video or audio"
            )
    pictures = tuple(
        DrawnPicture(read=read, number=number, digest=_loaded(image).key)
        for number, image in enumerate(images)
    )
    return question_text(text, task), pictures


def question_text(context: str, task: str) -> str:
    """Take the picture placeholders off the front of a context: the backbone sets its own.

    Raises
    ------
    UsageError
        If there are others inside the text.
    """
    text = re.sub(r"\A(?:<image>\s*)+", "", context)
    if "<image>" in text:
        raise UsageError(
            f"lmms-eval task {task} places pictures inside its text; etcbench shows them in front"
        )
    return text


def _is_picture_file(image: Any) -> bool:
    return isinstance(image, str) and Path(image).suffix.lower() in _PICTURE_FILES


def _loaded(image: Any) -> Picture:
    if isinstance(image, str):
        return Picture(Path(image).read_bytes(), path=image)
    return Picture(image)
