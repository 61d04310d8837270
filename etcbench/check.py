"""The regression gate: the answers must still be those that were written down.

`compare_records` puts the answers of a run beside those of an earlier one. `run_gate` asks a fixed
subset of every micro benchmark with every method again and compares with the committed answers. A
changed answer is either a tie, where the model's two best next tokens were as good as equal and
rounding may decide, or a regression.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from etcbench import registry
from etcbench.backbones import Backbone
from etcbench.checkpoints import CONFIG, installed, shipped
from etcbench.compressor import Budget, Compressor
from etcbench.console import progress
from etcbench.decoder import Decoder
from etcbench.doc import Doc
from etcbench.engine import Settings, answers
from etcbench.errors import BudgetError, MissingCheckpointError, UsageError
from etcbench.loading import MICRO, load_task, task_names
from etcbench.recorded import results_folder
from etcbench.run import load_compressor
from etcbench.store import RunDirectory
from etcbench.task import Task

SAMPLES = 64
BUDGETS = ("16", "21", "32", "1")
# Logits of fp32 models differ by some 1e-5 between machines and batch shapes.
TIE = 1e-3


@dataclass(frozen=True)
class Expected:
    """One committed answer.

    Attributes
    ----------
    method, tokens, task : str
        The cell; ``tokens`` is empty for a method without a budget.
    id : str
        The sample.
    response : str
        What the method answered.
    """

    method: str
    tokens: str
    task: str
    id: str
    response: str

    @property
    def cell(self) -> tuple[str, str, str]:
        """Method, budget and benchmark."""
        return self.method, self.tokens, self.task


@dataclass(frozen=True)
class Change:
    """An answer that is not what it was.

    Attributes
    ----------
    method, tokens, task, id : str
        The cell and the sample.
    picture : str
        Group of the sample: its picture.
    old, new : str
        The answers; an error is in parentheses.
    gap : float or None
        Logit of the new answer's first differing token minus that of the old one's; None where
        no model is at hand.
    """

    method: str
    tokens: str
    task: str
    id: str
    picture: str
    old: str
    new: str
    gap: float | None = None

    @property
    def tie(self) -> bool:
        """Whether rounding may have decided."""
        return self.gap is not None and abs(self.gap) < TIE

    @property
    def verdict(self) -> str:
        """Say whether it matters."""
        return "tie" if self.tie else "changed"


@dataclass(frozen=True)
class Verdict:
    """Outcome of a check.

    Attributes
    ----------
    compared : int
        Answers that were compared.
    changes : tuple of Change
        Those that differ.
    missing : tuple of str
        What has no counterpart, in words.
    """

    compared: int
    changes: tuple[Change, ...]
    missing: tuple[str, ...] = ()

    @property
    def failed(self) -> bool:
        """Whether anything but ties changed, or something is missing."""
        return bool(self.missing) or any(not change.tie for change in self.changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        changes = [{**asdict(change), "verdict": change.verdict} for change in self.changes]
        return {
            "failed": self.failed,
            "compared": self.compared,
            "changes": changes,
            "missing": list(self.missing),
        }


def compare_records(run: Path, baseline: Path) -> Verdict:
    """Compare the answers of two run directories of the same benchmark.

    Raises
    ------
    UsageError
        If one is no run directory, or they ran on other data.
    """
    new, old = RunDirectory.read(run), RunDirectory.read(baseline)
    ours, theirs = (each.manifest["config"] for each in (new, old))
    for name in ("task", "data", "style", "mode"):
        if ours[name] != theirs[name]:
            raise UsageError(
                f"{run} and {baseline} cannot be compared: {name} is {ours[name]!r} in the first "
                f"and {theirs[name]!r} in the second"
            )
    cell = (ours["method"], ours["tokens"] or "", ours["task"])
    changes = [
        Change(*cell, key, str(record["group"]), _words(old.records[key]), _words(record))
        for key, record in new.records.items()
        if key in old.records and record["response"] != old.records[key]["response"]
    ]
    both = len(new.records.keys() & old.records.keys())
    counts = (len(old.records) - both, len(new.records) - both)
    texts = (
        f"{counts[0]} answers of {baseline} are not in {run}",
        f"{counts[1]} answers of {run} are not in {baseline}",
    )
    missing = tuple(text for text, count in zip(texts, counts, strict=True) if count)
    return Verdict(both, tuple(changes), missing)


def _words(record: Mapping[str, Any]) -> str:
    return record["response"] if record["status"] == "ok" else f"({record['error']})"


# The gate -------------------------------------------------------------------------------------


def gate_file(model: str) -> Path:
    """Name the file with the committed answers of an embedded model."""
    return results_folder("gate") / f"{model}.csv"


def read_gate(file: Path) -> list[Expected]:
    """Read committed answers.

    Raises
    ------
    UsageError
        If there are none.
    """
    if not file.is_file():
        raise UsageError(f"no {file}; write it with etcbench check --update")
    with file.open(newline="") as stream:
        return [Expected(**row) for row in csv.DictReader(stream)]


def write_gate(file: Path, rows: Iterable[Expected]) -> None:
    """Write answers as csv, sorted."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [f.name for f in fields(Expected)], lineterminator="\n")
        writer.writeheader()
        for row in sorted(rows, key=lambda row: (row.cell, row.id)):
            writer.writerow(asdict(row))


def run_gate(
    backbone: Backbone, expected: Sequence[Expected], methods: Sequence[str] = ()
) -> Verdict:
    """Ask everything again and compare.

    Parameters
    ----------
    backbone : Backbone
        An embedded model.
    expected : sequence of Expected
        Committed answers.
    methods : sequence of str
        Only these; all by default.
    """
    known = {(row.cell, row.id): row.response for row in expected}
    cells = gate_cells(backbone, methods)
    compared, changes = 0, []
    missing = []
    asked = {row.cell[:2] for row in expected if not methods or row.method in methods}
    for name, tokens in sorted(asked - set(cells)):
        missing.append(f"{name} {tokens}: has committed answers and cannot run any more")
    for compressor, task, docs, given in _asked(backbone, cells):
        cell = (compressor.name(), str(compressor.budget or ""), task.name)
        unknown = 0
        for doc in docs:
            old, new = known.get((cell, doc.id)), given[doc.id]
            if old is None:
                unknown += 1
                continue
            compared += 1
            if old != new:
                gap = logit_gap(backbone, compressor, task, doc, old, new)
                changes.append(Change(*cell, doc.id, doc.group, old, new, gap))
        if unknown:
            missing.append(f"{' '.join(cell)}: {unknown} samples have no committed answer")
    return Verdict(compared, tuple(changes), tuple(missing))


def current_answers(backbone: Backbone) -> list[Expected]:
    """Answer the subset with every method: what `write_gate` commits."""
    return [
        Expected(compressor.name(), str(compressor.budget or ""), task.name, key, response)
        for compressor, task, _, given in _asked(backbone, gate_cells(backbone))
        for key, response in given.items()
    ]


def gate_cells(backbone: Backbone, methods: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Pair every method with the first of `BUDGETS` that it serves, or each that comes trained."""
    cells = []
    for name in methods or registry.names("baselines"):
        if not registry.load("baselines", name).takes_budget:
            budgets = [""]
        else:
            trained = _trained_for(name, backbone.spec.name)
            served = (text for text in BUDGETS if _serves(name, text, backbone))
            budgets = trained or list(islice(served, 1))
        cells += [(name, budget) for budget in budgets]
    return cells


def _trained_for(method: str, model: str) -> list[str]:
    """Budgets of the checkpoints of a method that come with a model."""
    configs = [json.loads((folder / CONFIG).read_text()) for folder in shipped(model)]
    found = {str(config["tokens"] or "") for config in configs if config["method"] == method}
    return sorted(found - {""})


def _serves(name: str, budget: str, backbone: Backbone) -> bool:
    try:
        load_compressor(name, budget, backbone)
    except (BudgetError, MissingCheckpointError):
        return False
    return True


def _asked(
    backbone: Backbone, cells: Sequence[tuple[str, str]]
) -> Iterator[tuple[Compressor, Task, list[Doc], dict[str, str]]]:
    """Answer the subset of every micro benchmark, cell by cell."""
    # a variant counts where it has rows of its own
    bases = registry.names("tasks")
    names = [name for name in task_names() if name in bases or (MICRO / f"{name}.parquet").exists()]
    tasks = [load_task(name, "micro", limit=SAMPLES) for name in names]
    settings = Settings(batch_size=SAMPLES)
    with progress(f"gate {backbone.spec.name}", len(cells) * len(tasks)) as advance:
        for name, tokens in cells:
            method = load_compressor(name, Budget.parse(tokens) if tokens else None, backbone)
            with installed(method.compressor, backbone):
                for loaded in tasks:
                    docs = list(loaded.docs)
                    given = {
                        answer.doc.id: f"({answer.error})"
                        if answer.response is None
                        else answer.response
                        for batch in answers(
                            backbone, method.compressor, loaded.task, docs, settings
                        )
                        for answer in batch
                    }
                    yield method.compressor, loaded.task, docs, given
                    advance(1)


@torch.inference_mode()
def logit_gap(
    backbone: Backbone, compressor: Compressor, task: Task, doc: Doc, old: str, new: str
) -> float:
    """How clearly the model now prefers the first token in which two answers differ.

    Parameters
    ----------
    backbone, compressor, task, doc
        What was asked; the method's weights are in place.
    old, new : str
        Two answers.

    Returns
    -------
    float
        Logit of the new answer's token minus the old one's, where they part.
    """
    texts = (old, new)
    tokenizer = backbone.processor.tokenizer
    end = min(backbone.eos_ids)
    ids = [[*tokenizer(" " + text, add_special_tokens=False).input_ids, end] for text in texts]
    common = 0
    while common < min(map(len, ids)) - 1 and ids[0][common] == ids[1][common]:
        common += 1
    text = task.prompt(doc)
    shown = doc.pictures if compressor.uses_image else ()
    prompt = backbone.prompt(text, len(shown), compressor.prompt_layout)
    decoder = Decoder(backbone, compressor)
    visual = [
        backbone.visual(backbone.preprocess([p.open()], [p.key]), compressor, [(0, text)])
        for p in shown
    ]
    prefix = backbone.assemble([prompt], visual, compressor.learned_tokens())
    kv, logits = decoder.whole(prefix, [prompt.after])
    for token in ids[0][:common]:
        logits = decoder.step(kv, torch.tensor([token], device=backbone.device))
    first, second = ids[0][common], ids[1][common]
    return float(logits[0, second] - logits[0, first])
