"""``etcbench check``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from etcbench.cli.app import Json, app, examples, split_list
from etcbench.errors import UsageError

SHOWN = 40


@app.command(
    epilog=examples(
        "etcbench check", "etcbench check runs/new/pope-1a2b3c4d runs/old/pope-1a2b3c4d"
    )
)
def check(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="RUN BASELINE: two runs of the same benchmark.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="Embedded models of the gate; default: all.")
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Methods of the gate; default: all.")
    ] = None,
    update: Annotated[
        bool, typer.Option("--update", help="Write the gate's answers anew instead of comparing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare answers with those of an earlier run, or of the committed gate.

    Without runs, asks a fixed subset of every micro benchmark with every method and compares with
    the committed answers. A changed answer is shown with its picture, both texts and the logit
    gap; ties, where rounding may decide, do not fail. Exit code 1 when an answer changed or is
    missing.
    """
    if runs and len(runs) != 2:
        raise UsageError("etcbench check takes two runs, RUN and BASELINE, or none for the gate")
    if runs and (model or method or update):
        raise UsageError("--model, --method and --update belong to the gate; leave out the runs")
    if update and method:
        raise UsageError("--update writes every method's answers; leave --method out")
    from etcbench.check import compare_records
    from etcbench.console import quiet_libraries, show

    quiet_libraries()
    if runs:
        verdicts = {"": compare_records(*runs)}
    else:
        verdicts = _gate(split_list(model), split_list(method), update)
    if as_json:
        print(json.dumps({k: v.to_dict() for k, v in verdicts.items()}, indent=2))
        raise typer.Exit(int(any(verdict.failed for verdict in verdicts.values())))
    for name, verdict in verdicts.items():
        rows = [
            [
                " ".join(filter(None, (change.method, change.tokens, change.task))),
                change.id,
                change.picture,
                change.old,
                change.new,
                "" if change.gap is None else f"{change.gap:.2g}",
                change.verdict,
            ]
            for change in verdict.changes[:SHOWN]
        ]
        ties = sum(change.tie for change in verdict.changes)
        changed = len(verdict.changes) - ties
        notes = [
            f"{name} {verdict.compared} answers compared: {changed} changed, {ties} ties".strip()
        ]
        if len(verdict.changes) > SHOWN:
            notes.append(f"{len(verdict.changes) - SHOWN} more with --json")
        notes += verdict.missing
        if rows:
            columns = ["cell", "sample", "picture", "old", "new", "logit gap", "verdict"]
            show(columns, rows, notes)
        else:
            print("\n".join(notes))
    raise typer.Exit(int(any(verdict.failed for verdict in verdicts.values())))


def _gate(models: list[str], methods: list[str], update: bool) -> dict:
    from etcbench import registry
    from etcbench.backbones import load_backbone
    from etcbench.backbones.loading import micro_models
    from etcbench.check import Verdict, current_answers, gate_file, read_gate, run_gate, write_gate
    from etcbench.errors import unknown_name

    for name in models:
        if name not in micro_models():
            raise unknown_name("embedded model", name, micro_models())
    for name in methods:
        registry.load("baselines", name)
    verdicts = {}
    for name in models or micro_models():
        backbone = load_backbone(name)
        if update:
            rows = current_answers(backbone)
            write_gate(gate_file(name), rows)
            verdicts[name] = Verdict(len(rows), ())
        else:
            verdicts[name] = run_gate(backbone, read_gate(gate_file(name)), methods)
    return verdicts
