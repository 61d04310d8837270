"""One sample of a benchmark, its pictures, and a lazy sequence of samples.

Nothing here knows a benchmark by name. Pictures stay encoded until a model asks for them, so a
sequence of 100,000 samples costs the memory of its index.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from etcbench.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

Row = Mapping[str, Any]
_BLOCK = 1024
_PICTURES = 32  # rows with their pictures, of which a block is held at a time


class UnreadableImage(Exception):  # noqa: N818 - a sample's status, not a programming error
    """The bytes of a picture do not decode; the message says which picture and why."""


@dataclass(frozen=True)
class Picture:
    """A picture as it came, decoded only on request.

    Parameters
    ----------
    data : bytes or PIL.Image.Image
        The encoded file, or an image that some other harness already decoded.
    box : tuple of float, optional
        Corners (x0, y0, x1, y1) in pixels of a red one-pixel outline to draw (spec tasks 4.7.2).
    path : str
        Where it came from, for messages only; it is not part of the identity.
    """

    data: bytes | PilImage
    box: tuple[float, float, float, float] | None = None
    path: str = ""

    @cached_property
    def key(self) -> str:
        """SHA-256 (hex) of the content and the drawn box: equal keys are equal pictures."""
        digest = hashlib.sha256()
        if isinstance(self.data, bytes):
            digest.update(self.data)
        else:
            digest.update(f"{self.data.mode}{self.data.size}".encode())
            digest.update(self.data.tobytes())
        if self.box is not None:
            digest.update(repr(self.box).encode())
        return digest.hexdigest()

    @cached_property
    def size(self) -> tuple[int, int] | None:
        """Width and height in pixels from the file's header; None if it has none."""
        from PIL import Image

        if not isinstance(self.data, bytes):
            return self.data.size
        try:
            with Image.open(io.BytesIO(self.data)) as encoded:
                return encoded.size
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return None

    @property
    def _name(self) -> str:
        return self.path or f"picture {self.key[:12]}"

    def open(self) -> PilImage:
        """Decode to RGB and draw the box.

        Raises
        ------
        UnreadableImage
            If the bytes are not a complete picture.
        """
        from PIL import Image, ImageDraw, UnidentifiedImageError

        try:
            if isinstance(self.data, bytes):
                with Image.open(io.BytesIO(self.data)) as encoded:
                    image = encoded.convert("RGB")
            else:
                image = self.data.convert("RGB")
        except UnidentifiedImageError as error:  # its message names an object in memory
            raise UnreadableImage(f"{self._name} does not decode: in no known format") from error
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UnreadableImage(f"{self._name} does not decode: {error}") from error
        if self.box is not None:
            ImageDraw.Draw(image).rectangle(self.box, outline="red", width=1)
        return image


@dataclass(frozen=True)
class Doc:
    """One question of a benchmark.

    Attributes
    ----------
    id : str
        Unique in its benchmark.
    group : str
        Samples that must stay together under ``--limit`` and in the bootstrap: the rotations of
        a question, the two questions of an MME picture, all questions on one picture.
    pictures : tuple of Picture
        In the order of their placeholders; empty for a text-only question.
    fields : mapping
        What the prompt is made of.
    gold : Any
        The reference, read only.
    categories : mapping of str to str
        Kind of breakdown (``"subtask"``) to this sample's value (``"existence"``).
    """

    id: str
    group: str
    pictures: tuple[Picture, ...]
    fields: Mapping[str, Any]
    gold: Any
    categories: Mapping[str, str] = field(default_factory=dict)


def absent(value: Any) -> bool:
    """Tell whether a text column is empty: None, NaN, blank, "nan" or "none"."""
    return value is None or value != value or str(value).strip().lower() in ("", "nan", "none")


def pictures_in(value: Any, folder: Path | None = None) -> tuple[Picture, ...]:
    """Read whatever a dataset keeps in its image column.

    Parameters
    ----------
    value : None, dict, bytes, str, PIL.Image.Image or a sequence of them
        ``{bytes, path}`` as `datasets` stores it, encoded bytes, base64 text, a path, an image.
    folder : Path, optional
        What relative paths are relative to.

    Raises
    ------
    UsageError
        If a named file does not exist or a string is neither a file nor base64.
    """
    if value is None or (isinstance(value, float) and value != value):
        return ()
    if isinstance(value, list | tuple):
        return tuple(picture for item in value for picture in pictures_in(item, folder))
    if isinstance(value, Mapping):
        if value.get("bytes") is not None:
            return (Picture(value["bytes"], path=value.get("path") or ""),)
        return pictures_in(value.get("path"), folder)
    if isinstance(value, str):
        return (_from_text(value, folder or Path()),)
    return (Picture(value),)


def _from_text(value: str, folder: Path) -> Picture:
    # a base64 picture is longer than any path the file system accepts
    if len(value) < 1024 and (folder / value).is_file():
        return Picture((folder / value).read_bytes(), path=value)
    try:
        return Picture(base64.b64decode(value, validate=True))
    except (binascii.Error, ValueError):
        shown = value if len(value) < 80 else value[:77] + "..."
        raise UsageError(f"image {shown!r} is neither a file in {folder} nor base64 text") from None


class Docs(Sequence[Doc]):
    """A lazy sequence of samples over a table whose pictures stay encoded.

    Parameters
    ----------
    table : sequence of rows
        Usually a memory-mapped ``datasets.Dataset``.
    build : callable
        ``(row, row index) -> Doc``.
    fingerprint : str
        Identity of the content: a hub revision or a hash of the files.
    explode : str, optional
        Column with a list in it of which every entry is a sample of its own; ``build`` then sees
        the single entry in that column and its place in ``entry_index``.
    entries : sequence of (int, int), optional
        The (row, entry) pairs to serve; every one if absent.
    """

    def __init__(
        self,
        table: Any,
        build: Callable[[Row, int], Doc],
        fingerprint: str,
        explode: str | None = None,
        entries: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        self.table = table
        self._build = build
        self._explode = explode
        self._source = fingerprint
        self._partial = entries is not None
        self._entries = _entries(table, explode) if entries is None else entries

    @property
    def fingerprint(self) -> str:
        """Identity of the content, and of the choice of rows when not all are served."""
        if not self._partial:
            return self._source
        chosen = hashlib.sha256(repr(list(self._entries)).encode()).hexdigest()[:12]
        return f"{self._source}[{len(self)} rows {chosen}]"

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, index: int) -> Doc: ...
    @overload
    def __getitem__(self, index: slice) -> Docs: ...
    def __getitem__(self, index: int | slice) -> Doc | Docs:
        if isinstance(index, slice):
            return self._subset(self._entries[index])
        row, entry = self._entries[index]
        return self._doc(self.table[row], row, entry)

    def __iter__(self) -> Iterator[Doc]:
        return self._read(self.table, _PICTURES, {})

    def without_pictures(self) -> Iterator[Doc]:
        """Every sample with its pictures left out: for scoring and grouping, without reading."""
        bare = self.table
        if "image" in getattr(bare, "column_names", ()):
            bare = bare.remove_columns("image")
        return self._read(bare, _BLOCK, {"image": None})

    def _read(self, table: Any, size: int, instead: Row) -> Iterator[Doc]:
        """Build the samples from blocks of ``size`` rows, some of their columns replaced."""
        block: dict[str, Any] | list[Row] = {}
        block_start = -1
        for row, entry in self._entries:
            # `datasets` reads a block of rows in about the time of one
            if row // size != block_start:
                block_start = row // size
                block = table[block_start * size : (block_start + 1) * size]
            place = row % size
            if isinstance(block, dict):
                found = {name: column[place] for name, column in block.items()}
            else:
                found = dict(block[place])
            yield self._doc({**found, **instead}, row, entry)

    def limit(self, n: int) -> Docs:
        """Keep the first groups until at least `n` samples are in, never part of a group."""
        if n < 1:
            raise UsageError(f"a limit of {n} samples leaves nothing; give 1 or more")
        groups = [doc.group for doc in self.without_pictures()]
        sizes: dict[str, int] = {}
        for group in groups:
            sizes[group] = sizes.get(group, 0) + 1
        kept: set[str] = set()
        total = 0
        for group, size in sizes.items():
            if total >= n:
                break
            kept.add(group)
            total += size
        if total == len(self):
            return self
        return self._subset([e for e, g in zip(self._entries, groups, strict=True) if g in kept])

    def rows(self, wanted: Iterable[int]) -> Docs:
        """Keep the samples of these rows of the table."""
        chosen = set(wanted)
        entries = [entry for entry in self._entries if entry[0] in chosen]
        return self if len(entries) == len(self) else self._subset(entries)

    def _subset(self, entries: Sequence[tuple[int, int]]) -> Docs:
        return Docs(self.table, self._build, self._source, self._explode, entries)

    def _doc(self, row: Row, index: int, entry: int) -> Doc:
        if self._explode is not None:
            row = {**row, self._explode: row[self._explode][entry], "entry_index": entry}
        return self._build(row, index)


def _entries(table: Any, explode: str | None) -> Sequence[tuple[int, int]]:
    if explode is None:
        return [(row, 0) for row in range(len(table))]
    return [(row, k) for row, items in enumerate(table[explode]) for k in range(len(items))]
