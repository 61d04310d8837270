"""From records to a score: what `summary.json` says.

It contains nothing that depends on the time, the machine or the order of work, so an interrupted
and continued run writes the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from etcbench.doc import Doc
from etcbench.engine import Answer
from etcbench.errors import UsageError
from etcbench.task import Task

MICRO = "micro figures: not comparable with published ones"
COUNTS = ("entering", "layer_average", "cached")


def record_of(task: Task, answer: Answer, mode: str) -> dict[str, Any]:
    """Write one answer as a line of ``records.jsonl``."""
    scored = task.score_one(answer.doc, answer.response, mode)
    record = {
        "id": answer.doc.id,
        "group": answer.doc.group,
        "prompt": hashlib.sha256(answer.prompt.encode()).hexdigest()[:16],
        "response": answer.response,
        "parsed": scored.parsed.value,
        "correct": scored.outcome,
        "entering": answer.entering,
        "layer_average": answer.layer_average,
        "cached": answer.cached,
        "status": "ok" if answer.error is None else "error",
    }
    if answer.drafts is not None:
        record["drafts"] = asdict(answer.drafts)
    return record if answer.error is None else {**record, "error": answer.error}


def summarise(
    task: Task,
    docs: Sequence[Doc],
    records: Mapping[str, Mapping[str, Any]],
    mode: str,
    marks: Sequence[str],
) -> dict[str, Any]:
    """Score a run.

    Parameters
    ----------
    task : Task
        The benchmark.
    docs : sequence of Doc
        Every sample, pictures not needed.
    records : mapping of str to record
        By sample id. Of an unfinished run only groups with all their records are scored.
    mode : str
        Rule set.
    marks : sequence of str
        What a reader must know, e.g. ``"micro data"``, ``"untrained"``.

    Raises
    ------
    UsageError
        If no group is complete.
    """
    missing = {doc.group for doc in docs if doc.id not in records}
    scored = [doc for doc in docs if doc.group not in missing]
    if not scored:
        raise UsageError(f"{task.name}: no group of samples has all its answers yet")
    report = task.score(((doc, records[doc.id]["response"]) for doc in scored), mode)
    answered = [records[doc.id] for doc in scored if records[doc.id]["status"] == "ok"]
    return {
        **report.to_dict(),
        "n_missing": len(docs) - len(scored),
        # fsum: the same mean in whatever order the samples were answered
        "tokens": {
            name: math.fsum(row[name] for row in answered) / len(answered) if answered else None
            for name in COUNTS
        },
        "marks": list(marks),
        "micro": MICRO if any(mark.startswith("micro") for mark in marks) else None,
    }
