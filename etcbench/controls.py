"""Controls of the data: the same questions on the wrong pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from etcbench.doc import Doc, Docs
from etcbench.errors import UsageError

SHUFFLED = " pictures shuffled"  # behind the fingerprint of the rows


def pictures_shuffled(data: str) -> bool:
    """Whether a run with this fingerprint of its rows asked about the wrong pictures."""
    return data.endswith(SHUFFLED)


class ShuffledPictures(Docs):
    """Samples whose pictures are those of another group; everything else is unchanged.

    A model that looks at the picture loses its score here; one that guesses from the question
    keeps it. The groups with pictures are put in a circle, and each takes the pictures of the one
    opposite, so the pairing is fixed and no group keeps its own.

    Parameters
    ----------
    docs : Docs
        The samples.

    Raises
    ------
    UsageError
        If fewer than two groups have pictures.
    """

    def __init__(self, docs: Docs) -> None:
        self.docs = docs
        first: dict[str, int] = {}
        for number, doc in enumerate(docs):
            if doc.pictures:
                first.setdefault(doc.group, number)
        groups = list(first)
        if len(groups) < 2:
            raise UsageError("shuffling the pictures needs at least two groups of samples")
        half = len(groups) // 2
        self._donor = {
            group: first[groups[(place + half) % len(groups)]] for place, group in enumerate(groups)
        }

    @property
    def fingerprint(self) -> str:
        """Identity of the rows, with the control named."""
        return self.docs.fingerprint + SHUFFLED

    def __len__(self) -> int:
        return len(self.docs)

    def __getitem__(self, index: int) -> Doc:  # type: ignore[override]
        doc = self.docs[index]
        if not doc.pictures:
            return doc
        return replace(doc, pictures=self.docs[self._donor[doc.group]].pictures)

    def __iter__(self) -> Iterator[Doc]:
        return (self[index] for index in range(len(self)))

    def without_pictures(self) -> Iterator[Doc]:
        """Every sample with its pictures left out."""
        return self.docs.without_pictures()
