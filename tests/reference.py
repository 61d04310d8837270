"""Find the reference data that some tests check against; it is no part of this repository."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

_BESIDE = Path(__file__).parents[2] / "shared" / "reference"
REFERENCE = Path(os.environ.get("ETCBENCH_REFERENCE", _BESIDE))

needs_reference = pytest.mark.skipif(
    not REFERENCE.is_dir(),
    reason=f"no reference data at {REFERENCE}; set ETCBENCH_REFERENCE to its folder",
)


def golden(name: str) -> list[dict[str, Any]]:
    """Read the rows of ``golden/<name>.jsonl``; none when the reference data is absent."""
    path = REFERENCE / "golden" / f"{name}.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def expected() -> dict[str, dict[str, Any]]:
    """Read ``scoring/expected.json`` by id; empty when the reference data is absent."""
    path = REFERENCE / "scoring" / "expected.json"
    if not path.is_file():
        return {}
    return {entry["id"]: entry for entry in json.loads(path.read_text())["entries"]}
