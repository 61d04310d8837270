"""The command line. Every heavy import happens inside a command, so that help is immediate."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from etcbench.errors import UsageError

if TYPE_CHECKING:
    from etcbench.report import Table
    from etcbench.sweep import Outcome

INTERRUPTED = 130  # the shell's code for Ctrl-C; typer returns it for a KeyboardInterrupt

app = typer.Typer(
    name="etcbench",
    help="Benchmark visual-token compression in vision-language models.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _examples(*commands: str) -> str:
    # \b keeps the lines as they are
    return "\b\nExample:\n" + "\n".join(f"  {command}" for command in commands)


Model = Annotated[
    str | None,
    typer.Option(help="Embedded model, directory or hub id; default: the embedded micro model."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Partial = Annotated[
    bool, typer.Option("--partial", help="Show scores although samples are missing, with n.")
]
Split = Annotated[str | None, typer.Option(help="Split of the data; default: the benchmark's.")]


@app.command(
    epilog=_examples(
        "etcbench run --method etc --tokens 1 --task mme",
        "etcbench run --model llava-hf/llava-1.5-7b-hf --method full,fastv --tokens 192,64 "
        "--task mme,pope",
    )
)
def run(
    method: Annotated[
        list[str], typer.Option(help="Methods, comma-separated or repeated; see list methods.")
    ],
    task: Annotated[
        list[str], typer.Option(help="Benchmarks, comma-separated or repeated; see list tasks.")
    ],
    tokens: Annotated[
        list[str] | None,
        typer.Option(help="Budgets: 64 (entering, layer-averaged) or kept:64 (after the drop)."),
    ] = None,
    model: Model = None,
    data: Annotated[
        str | None,
        typer.Option(help="hub, micro or a directory; default: hub for real models, else micro."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At least N samples, in whole groups.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions answered together.", min=1)] = 16,
    out: Annotated[Path, typer.Option(help="Folder of the run directories.")] = Path("runs"),
    checkpoint: Annotated[
        str | None, typer.Option(help="Weights of a trained method (a folder).")
    ] = None,
    untrained: Annotated[
        bool, typer.Option("--untrained", help="Run a trained method with random weights.")
    ] = False,
    style: Annotated[str | None, typer.Option(help="Prompt style of the benchmark.")] = None,
    mode: Annotated[str | None, typer.Option(help="Rule set of the scoring.")] = None,
    split: Split = None,
    option: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE for the methods that have such an option.")
    ] = None,
    model_option: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE, e.g. image=processor.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    attention: Annotated[str, typer.Option(help="sdpa or eager.")] = "sdpa",
    seed: Annotated[int, typer.Option(help="Seed of random weights and random methods.")] = 0,
    no_reuse: Annotated[
        bool, typer.Option("--no-reuse", help="Do not share a picture's work among questions.")
    ] = False,
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

    methods, tasks = _split(method), _split(task)
    if not methods or not tasks:
        raise UsageError("nothing to run; name at least one --method and one --task")
    budgets = [Budget.parse(text) for text in _split(tokens)]
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
            settings=Settings(batch_size, style, None, not no_reuse),
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
        _print(table)
        for entry in missing:
            notice(f"not run: {entry['cell']}: {entry['reason']}")
    raise typer.Exit(exit_code(outcomes))


@app.command(
    epilog=_examples(
        "etcbench compare runs --format md", "etcbench compare --table etc-1 --published-only"
    )
)
def compare(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Runs, or folders with runs; default: runs/.")
    ] = None,
    form: Annotated[
        str | None,
        typer.Option("--format", help="md, csv or json; published tables also latex or html."),
    ] = None,
    partial: Partial = False,
    name: Annotated[
        str | None, typer.Option("--table", help="Table of a paper: etc-1 to 9, selective, ...")
    ] = None,
    published_only: Annotated[
        bool, typer.Option("--published-only", help="Fill --table with published numbers.")
    ] = False,
) -> None:
    """Put runs into one table, or show a table of a paper.

    A row per model, method and budget, a column per benchmark; csv and json give one record per
    figure. Exit code 1 when a score is not shown because samples are missing.
    """
    if name or published_only:
        from etcbench.published import show_published

        show_published(name, form, alone=published_only and not runs)
        return
    from etcbench.report import compare as build
    from etcbench.report import render

    table = build(*(runs or [Path("runs")]), partial=partial)
    if form is None:
        _print(table)
    else:
        print(render(table, form))
    raise typer.Exit(int(table.refused > 0))


@app.command(
    epilog=_examples(
        "etcbench score --task mme --predictions answers.jsonl --gold mme.parquet",
        "etcbench score --task pope --predictions runs/micro-llava/full/pope-1a2b3c4d/records.jsonl"
        " --data micro",
    )
)
def score(
    task: Annotated[str, typer.Option(help="Benchmark; see list tasks.")],
    predictions: Annotated[Path, typer.Option(help="Predictions file; for MME also a folder.")],
    gold: Annotated[
        Path | None, typer.Option(help="Gold answers, official format or hub columns.")
    ] = None,
    form: Annotated[
        str | None, typer.Option("--format", help="Format of the predictions; default: by content.")
    ] = None,
    mode: Annotated[str | None, typer.Option(help="Rule set of the scoring.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Questions from here instead: hub, micro or a directory.")
    ] = None,
    split: Split = None,
    limit: Annotated[int | None, typer.Option(help="As the run's --limit.")] = None,
    as_json: Json = False,
) -> None:
    """Score a predictions file alone.

    Needs no model. Exit code 1 when samples have no prediction.
    """
    from etcbench.console import quiet_libraries, show
    from etcbench.report import score_rows
    from etcbench.scoring.files import score_file
    from etcbench.summary import MICRO

    quiet_libraries()
    report = score_file(task, predictions, gold, form, mode, data, split, limit)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2, ensure_ascii=False))
    else:
        notes = [*report.notes, *([MICRO] if data == "micro" else [])]
        show(["score", "value", "95 % interval", "n"], score_rows(report), notes)
    raise typer.Exit(int(report.n_error > 0))


@app.command(
    epilog=_examples(
        "etcbench train --method etc --tokens 1",
        "etcbench train --config micro-llava --out runs/training/micro-llava",
    )
)
def train(
    method: Annotated[str | None, typer.Option(help="Method; needs a recipe for it.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Budget to train for.", min=1)] = None,
    model: Annotated[str | None, typer.Option(help="Model; default: the recipe's.")] = None,
    data: Annotated[str | None, typer.Option(help="Training data; default: the recipe's.")] = None,
    config: Annotated[
        str | None, typer.Option(help="Recipe, a name or a YAML file; default: the method's.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed; default: the recipe's.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Output folder; default: runs/training/<recipe>.")
    ] = None,
) -> None:
    """Train a method, or the embedded model.

    Takes the recipe that comes with the package for the method, or one of your own. The same
    command again continues a training that stopped.
    """
    from etcbench.console import notice, quiet_libraries
    from etcbench.recipes import load_recipe
    from etcbench.recipes import train as run_recipe

    quiet_libraries()
    name = config or _recipe_for(method, tokens)
    recipe = load_recipe(name, method=method, tokens=tokens, model=model, data=data, seed=seed)
    folder = out or Path("runs/training") / recipe.name
    notice(f"recipe {recipe.name}: {recipe.method} on {recipe.model}, into {folder}")
    result = run_recipe(recipe, folder)
    notice(f"trained: {result}")
    print(result)


def _recipe_for(method: str | None, tokens: int | None) -> str:
    """Name of the recipe for a method: of that budget if there is one, else of any."""
    from etcbench.recipes import load_recipe, recipe_names

    recipes = [load_recipe(name) for name in recipe_names()]
    fitting = [recipe for recipe in recipes if method and recipe.method == method]
    if not fitting:
        known = ", ".join(f"{recipe.name} ({recipe.method})" for recipe in recipes)
        wanted = f"for method {method!r}" if method else "named"
        raise UsageError(f"no recipe {wanted}; there is {known}, or give a YAML file with --config")
    return min(fitting, key=lambda recipe: recipe.tokens != tokens).name


@app.command(name="list", epilog=_examples("etcbench list methods"))
def list_(
    kind: Annotated[str, typer.Argument(help="methods, tasks, models or runs.")],
    out: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """List methods, tasks, models or runs."""
    from etcbench.catalog import catalog
    from etcbench.console import show

    found = catalog(kind, out)
    if as_json:
        print(json.dumps([dict(zip(found.columns, row, strict=True)) for row in found.rows]))
    else:
        show(found.columns, found.rows)


@app.command(epilog=_examples("etcbench doctor"))
def doctor(as_json: Json = False) -> None:
    """Say what is installed, cached and missing."""
    from etcbench.doctor import as_rows, examine

    state = examine()
    if as_json:
        print(json.dumps(state, indent=2))
    else:
        for what, found in as_rows(state):
            print(f"{what:<24}{found}")


@app.command(epilog=_examples("etcbench fetch --model llava-hf/llava-1.5-7b-hf --task mme,pope"))
def fetch(
    model: Model = None,
    task: Annotated[list[str] | None, typer.Option(help="Benchmarks, comma-separated.")] = None,
    split: Split = None,
) -> None:
    """Download what later offline runs need."""
    from etcbench.console import quiet_libraries
    from etcbench.doctor import fetch as download

    quiet_libraries()
    for line in download(model, _split(task), split):
        print(line)


def main() -> None:
    """Run the command line: one line and exit code 2 for wrong usage, never a traceback for it."""
    # typer ships its own copy of click; this is its base class of everything wrong with arguments
    wrong_arguments: type[Any] = typer.BadParameter.__mro__[2]
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except wrong_arguments as error:
        code = _complain(error.format_message())
    except UsageError as error:
        code = _complain(str(error))
    except typer.Abort:
        code = INTERRUPTED
    if code == INTERRUPTED:
        _complain("interrupted; nothing is lost, the same command continues the run")
    sys.exit(code or 0)


def _complain(message: str) -> int:
    lines = filter(None, (line.strip() for line in message.splitlines()))
    print(f"etcbench: {' '.join(lines)}", file=sys.stderr)
    return 2


def _split(texts: Iterable[str] | None) -> list[str]:
    """Flatten repeated, comma-separated values, each once."""
    parts = (part.strip() for text in texts or () for part in text.split(","))
    return list(dict.fromkeys(part for part in parts if part))


def _print(table: Table) -> None:
    from etcbench.console import show

    if table.rows:
        show(table.columns, table.rows, table.notes)
    elif table.notes:
        print("\n".join(table.notes))


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
