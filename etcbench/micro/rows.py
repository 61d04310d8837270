"""The micro benchmarks: parquet files in the columns of the hub data sets.

    python -m etcbench.micro.rows [--output DIR] [TASK ...]

The same seed gives the same rows. Pictures come from scene streams that training never touches: two
of three from ``iid`` (new scenes), one of three from ``combo`` (scenes with a pair of objects that
never met in training). A picture's file name starts with the name of its stream.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image, List, Value

from etcbench.errors import UsageError, unknown_name
from etcbench.micro.scenes import POLICIES, Policy, Scene, encode_jpeg, scene_at

DATA = Path(__file__).parent / "data"
SEED = 1
CYCLE: tuple[Policy, ...] = ("iid", "iid", "combo")
TEXT, INT, INT32, INT16, INT8, FLOAT = map(
    Value, ("string", "int64", "int32", "int16", "int8", "float32")
)
TEXTS = List(TEXT)
Row = dict[str, Any]


@dataclass(frozen=True)
class Shot:
    """A picture of a benchmark with the scene behind it.

    ``name`` is e.g. ``"combo_0300012"``; ``number`` is unique over all files; ``rng`` draws this
    picture's questions.
    """

    scene: Scene
    rng: np.random.Generator
    name: str
    number: int
    image: dict[str, Any]


@dataclass
class Pictures:
    """Hands out the pictures of one benchmark, none twice.

    Parameters
    ----------
    block : int
        Number of the benchmark; keeps the pictures of two benchmarks apart.
    cycle : sequence of str
        Policies, taken in turn.
    """

    block: int
    cycle: Sequence[Policy] = CYCLE
    taken: int = 0
    tried: int = 0
    rng: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng([SEED, len(POLICIES), self.block])

    def draw(self, wanted: Callable[[Scene], object] = bool, distortion: str | None = None) -> Shot:
        """Draw the next picture whose scene is ``wanted``."""
        policy = self.cycle[self.taken % len(self.cycle)]
        self.taken += 1
        while True:
            index = self.block * 100_000 + self.tried
            self.tried += 1
            scene, rng = scene_at(SEED, index, policy, distortion=distortion)
            if wanted(scene):
                break
        name = f"{policy}_{index:07d}"
        image = {"bytes": encode_jpeg(scene.render()), "path": f"{name}.jpg"}
        return Shot(scene, rng, name, POLICIES.index(policy) * 10_000_000 + index, image)


@dataclass(frozen=True)
class Benchmark:
    """How one file is made: its columns, and the function that fills them."""

    columns: dict[str, Any]
    build: Callable[[Pictures], list[Row]]
    cycle: Sequence[Policy] = CYCLE


def benchmarks() -> dict[str, Benchmark]:
    """Every micro benchmark by file stem; a stem's place in the list is its block of scenes."""
    from etcbench.micro.rows_lettered import LETTERED
    from etcbench.micro.rows_open import OPEN
    from etcbench.micro.rows_region import REGION

    return {**OPEN, **REGION, **LETTERED}


def build_table(stem: str) -> pa.Table:
    """Build the rows of one benchmark, with the column types that ``datasets`` reads back.

    Raises
    ------
    UsageError
        If there is no such benchmark.
    """
    known = benchmarks()
    if stem not in known:
        raise unknown_name("micro benchmark", stem, known)
    benchmark = known[stem]
    pictures = Pictures(list(known).index(stem) + 1, benchmark.cycle)
    schema = Features(benchmark.columns).arrow_schema
    return pa.Table.from_pylist(benchmark.build(pictures), schema=schema)


def write(stem: str, folder: Path = DATA) -> Path:
    """Write ``<stem>.parquet``; a picture that many rows share is stored once."""
    table = build_table(stem)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{stem}.parquet"
    # The default limit (1 MB) would give up the dictionary, and store each picture once per row.
    pq.write_table(table, file, compression="zstd", dictionary_pagesize_limit=64 << 20)
    return file


IMAGE = Image()


def main() -> None:
    """Write the files asked for, by default all."""
    parser = argparse.ArgumentParser(description="Write the micro benchmarks.")
    parser.add_argument("tasks", nargs="*", help="file stems; all by default")
    parser.add_argument("--output", type=Path, default=DATA)
    options = parser.parse_args()
    try:
        for stem in options.tasks or benchmarks():
            file = write(stem, options.output)
            print(f"{file}: {pq.read_metadata(file).num_rows} rows, {file.stat().st_size} bytes")
    except UsageError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
