"""``etcbench run``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from etcbench.cli.app import (
    AttentionBackend,
    Budgets,
    Checkpoint,
    Device,
    Dtype,
    Json,
    MethodOptions,
    Methods,
    Model,
    Partial,
    Seed,
    Split,
    Untrained,
    app,
    examples,
    print_table,
    split_list,
)
from etcbench.errors import UsageError

if TYPE_CHECKING:
    from etcbench.sweep import Outcome


@app.command(
    epilog=examples(
        "etcbench run --method etc --tokens 1 --task mme",
        "etcbench run --model llava-hf/llava-1.5-7b-hf --method full,fastv --tokens 192,64 "
        "--task mme,pope",
    )
)
def run(
    method: Methods,
    task: Annotated[
        list[str], typer.Option(help="Benchmarks, comma-separated or repeated; see list tasks.")
    ],
    tokens: Budgets = None,
    model: Model = None,
    data: Annotated[
        str | None,
        typer.Option(help="hub, micro or a directory; default: hub for real models, else micro."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At least N samples, in whole groups.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions answered together.", min=1)] = 16,
    out: Annotated[Path, typer.Option(help="Folder of the run directories.")] = Path("runs"),
    checkpoint: Checkpoint = None,
    untrained: Untrained = False,
    style: Annotated[str | None, typer.Option(help="Prompt style of the benchmark.")] = None,
    mode: Annotated[str | None, typer.Option(help="Rule set of the scoring.")] = None,
    split: Split = None,
    option: MethodOptions = None,
    model_option: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE, e.g. image=processor.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    attention: AttentionBackend = "sdpa",
    seed: Seed = 0,
    shuffle_pictures: Annotated[
        bool,
        typer.Option("--shuffle-pictures", help="Control: ask every question on a wrong picture."),
    ] = False,
    no_reuse: Annotated[
        bool, typer.Option("--no-reuse", help="Do not share a picture's work among questions.")
    ] = False,
    workers: Annotated[
        int, typer.Option(help="Threads that open pictures ahead; 0: none.", min=0)
    ] = 2,
    cache: Annotated[
        int, typer.Option(help="MiB of prefixes kept for pictures that come again.", min=0)
    ] = 1024,
    partial: Partial = False,
    as_json: Json = False,
) -> None:
    """Evaluate methods on benchmarks.

    Runs every combination of method, budget and task. The same command again continues a run
    that stopped; a finished one prints its table. A method that cannot serve a budget, or has no
    checkpoint, is listed with the reason; the others go on. Exit code: 0 done, 1 samples or cells
    failed, 2 wrong usage.
    """
    from etcbench.compressor import Budget
    from etcbench.console import notice, quiet_libraries
    from etcbench.options import pairs

    methods, tasks = split_list(method), split_list(task)
    if not methods or not tasks:
        raise UsageError("nothing to run; name at least one --method and one --task")
    budgets = [Budget.parse(text) for text in split_list(tokens)]
    options = pairs(option or (), "--option")
    model_options = pairs(model_option or (), "--model-option")
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit} leaves nothing; give 1 or more")
    quiet_libraries()
    from etcbench.backbones.loading import default_model, micro_models
    from etcbench.engine import Settings
    from etcbench.report import tabulate_runs
    from etcbench.summary import MICRO
    from etcbench.sweep import Sweep, exit_code, run_sweep

    name, embedded = model or default_model(), micro_models()
    source = data or ("micro" if name in embedded else "hub")
    if name in embedded or source == "micro":
        notice(f"{name} on {source} data; {MICRO}")
    outcomes = run_sweep(
        Sweep(
            methods=methods,
            tasks=tasks,
            budgets=budgets,
            model=name,
            data=source,
            limit=limit,
            split=split,
            mode=mode,
            options=options,
            model_options=model_options,
            checkpoint=checkpoint,
            untrained=untrained,
            device=device,
            dtype=dtype,
            attention=attention,
            seed=seed,
            shuffle_pictures=shuffle_pictures,
            settings=Settings(batch_size, style, None, not no_reuse, workers, cache),
            out=out,
        )
    )
    done = [outcome.run for outcome in outcomes if outcome.run is not None]
    if not done and len(outcomes) == 1 and isinstance(outcomes[0].error, UsageError):
        raise outcomes[0].error
    missing = _not_run(outcomes)
    table = tabulate_runs(done, partial)
    if as_json:
        print(json.dumps({"runs": table.runs, "notes": table.notes, "not_run": missing}, indent=2))
    else:
        print_table(table)
        for entry in missing:
            notice(f"not run: {entry['cell']}: {entry['reason']}")
    raise typer.Exit(exit_code(outcomes))


def _not_run(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """Cells without a run and why; tasks that share the reason share the entry."""
    reasons: dict[tuple[str, str | None, str], list[str]] = {}
    for outcome in outcomes:
        if outcome.error is not None:
            key = (outcome.cell.method, outcome.cell.tokens, outcome.reason)
            reasons.setdefault(key, []).append(outcome.cell.task)
    return [
        {
            "cell": " ".join(filter(None, (method, budget))) + f" on {', '.join(tasks)}",
            "method": method,
            "tokens": budget,
            "tasks": tasks,
            "reason": reason,
        }
        for (method, budget, reason), tasks in reasons.items()
    ]
