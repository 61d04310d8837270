"""Records of a run by sample id: what is held in memory is where they stand in the file.

A run over 100,000 samples would otherwise grow by their answers while it runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Json = dict[str, Any]


class Records(Mapping[str, Json]):
    """The last record of each sample.

    Parameters
    ----------
    path : Path
        File with a record per line, to which lines may be appended.
    kept : mapping of str to dict, optional
        Records from elsewhere, which those of the file replace.
    """

    def __init__(self, path: Path, kept: Mapping[str, Json] | None = None) -> None:
        self._path = path
        # a record itself, or where its line begins
        self._places: dict[str, Json | int] = dict(kept or {})

    def note(self, key: str, start: int) -> None:
        """Say that the record of a sample is on the line that begins at byte ``start``."""
        self._places[key] = start

    def __getitem__(self, key: str) -> Json:
        place = self._places[key]
        if not isinstance(place, int):
            return place
        with self._path.open("rb") as file:
            file.seek(place)
            record: Json = json.loads(file.readline())
        return record

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
