"""Pictures are decoded and preprocessed by threads, ahead of the batch that is being answered.

Threads and not processes: decoding, resizing and normalising release the interpreter's lock, and
nothing has to be copied between processes (docs/decisions.md has the measurement).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from etcbench.backbones.base import Backbone, Pixels
from etcbench.doc import Picture, UnreadableImage


@dataclass(frozen=True)
class Opened:
    """Preprocessed pictures of a batch.

    Attributes
    ----------
    pixels : Pixels or None
        Those that decode, in one batch; None where none does.
    place : dict of str to int
        Place of each picture in ``pixels``, by the name it was asked for under.
    unreadable : dict of str to UnreadableImage
        Why the others do not decode.
    """

    pixels: Pixels | None = None
    place: dict[str, int] = field(default_factory=dict)
    unreadable: dict[str, UnreadableImage] = field(default_factory=dict)

    def has(self, names: Iterable[str]) -> bool:
        """Whether all of these were tried."""
        return all(name in self.place or name in self.unreadable for name in names)


def open_pictures(backbone: Backbone, pictures: Mapping[str, Picture]) -> Opened:
    """Decode and preprocess pictures; one that does not decode leaves the others alone."""
    images, unreadable = {}, {}
    for name, picture in pictures.items():
        try:
            images[name] = picture.open()
        except UnreadableImage as error:
            unreadable[name] = error
    if not images:
        return Opened(unreadable=unreadable)
    pixels = backbone.preprocess(list(images.values()), [pictures[name].key for name in images])
    return Opened(pixels, {name: place for place, name in enumerate(images)}, unreadable)


class PictureThreads:
    """Open pictures in the background.

    Parameters
    ----------
    backbone : Backbone
        Does the preprocessing.
    workers : int
        Threads; with 0 pictures are opened when they are asked for.
    """

    def __init__(self, backbone: Backbone, workers: int) -> None:
        self.workers = workers
        self._backbone = backbone
        self._pool = ThreadPoolExecutor(workers, "etcbench-picture") if workers else None

    def __enter__(self) -> PictureThreads:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def ahead(self, pictures: Mapping[str, Picture]) -> Callable[[], Opened]:
        """Start to open pictures; the call that is returned waits for them."""
        if self._pool is None or not pictures:
            return lambda: open_pictures(self._backbone, pictures)
        return self._pool.submit(open_pictures, self._backbone, dict(pictures)).result
