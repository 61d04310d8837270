"""``etcbench compare`` and ``etcbench score``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from etcbench.cli.app import Json, Partial, Split, app, examples, print_table
from etcbench.errors import UsageError


@app.command(
    epilog=examples(
        "etcbench compare runs --baseline full",
        "etcbench compare runs --table etc-1 --format latex",
        "etcbench compare --table etc-1 --published-only",
        "etcbench compare runs --curve curves.svg --x layer_average",
    )
)
def compare(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Runs, or folders with runs; default: runs/.")
    ] = None,
    form: Annotated[
        str | None,
        typer.Option("--format", help="md, csv, json or html; with --table also latex."),
    ] = None,
    partial: Partial = False,
    baseline: Annotated[
        str | None,
        typer.Option(help="Row to compare every score with, e.g. full or voco-1 (paired)."),
    ] = None,
    hard: Annotated[
        bool, typer.Option("--hard", help="Add scores on what a downsampled picture gets wrong.")
    ] = False,
    name: Annotated[
        str | None, typer.Option("--table", help="Table of a paper: etc-1 to 9, selective, ...")
    ] = None,
    published_only: Annotated[
        bool, typer.Option("--published-only", help="Fill --table with published numbers.")
    ] = False,
    curve: Annotated[
        Path | None,
        typer.Option(help="Draw scores against costs: .png, .svg, .pdf; no suffix: png and svg."),
    ] = None,
    axis: Annotated[
        str, typer.Option("--x", help="tokens, layer_average, kv, flops or latency.")
    ] = "tokens",
    places: Annotated[
        Path | None, typer.Option(help="For --format html: places.json of etcbench reproduce.")
    ] = None,
    costs: Annotated[
        Path | None, typer.Option(help="Output of etcbench measure --json, for the last three.")
    ] = None,
) -> None:
    """Put runs into one table, or show a table of a paper.

    A row per model, method and budget, a column per benchmark; csv and json give one record per
    figure. Exit code 1 when a score is not shown because samples are missing.
    """
    if name or published_only:
        _paper_table(name, runs, form, published_only, baseline, partial)
        return
    if curve is not None:
        _curve(runs or [Path("runs")], curve, axis, costs)
        return
    if form == "html":
        from etcbench.html_report import html_report
        from etcbench.measured import read_runs
        from etcbench.places import read_places
        from etcbench.report import in_order

        chosen = in_order(run for run in read_runs(runs or [Path("runs")]) if run.finished)
        print(
            html_report(chosen, baseline=baseline, places=read_places(places) if places else None)
        )
        return
    from etcbench.report import compare as build
    from etcbench.report import render

    table = build(*(runs or [Path("runs")]), partial=partial, baseline=baseline, hard=hard)
    if form is None:
        print_table(table)
    else:
        print(render(table, form))
    raise typer.Exit(int(table.refused > 0))


def _curve(runs: list[Path], file: Path, axis: str, costs: Path | None) -> None:
    """Draw runs, and say where the figure is."""
    from etcbench.curves import draw, points, read_costs
    from etcbench.measured import read_runs

    found = read_runs(runs)
    micro = any(run.summary and run.summary["micro"] for run in found)
    files = [file] if file.suffix else [file.with_suffix(s) for s in (".png", ".svg")]
    priced = None if costs is None else read_costs(costs)
    draw(points(found, axis, priced), axis, files, micro)
    print(*files, sep="\n")


def _paper_table(
    name: str | None,
    runs: list[Path] | None,
    form: str | None,
    published_only: bool,
    baseline: str | None,
    partial: bool,
) -> None:
    """Print a table of a paper: published numbers, and beside them those of runs."""
    from etcbench.console import show
    from etcbench.measured import measured_numbers, read_runs
    from etcbench.paper_sheets import measured_tables, published_table
    from etcbench.paper_tables import PAPER_TABLES
    from etcbench.tables import render_sheet

    if name is None:
        raise UsageError(
            f"--published-only needs --table NAME; NAME is one of {', '.join(PAPER_TABLES)}"
        )
    if published_only and runs:
        raise UsageError("--published-only is without runs; leave out one of them")
    if not published_only and not runs and not Path("runs").is_dir():
        raise UsageError("there is no runs/ here; name runs, or add --published-only, without runs")
    if published_only:
        sheets = [published_table(name)]
    else:
        numbers = measured_numbers(read_runs(runs or [Path("runs")]), baseline, partial)
        sheets = measured_tables(name, numbers, baseline)
    for sheet in sheets:
        if form is not None:
            print(render_sheet(sheet, form))
        else:
            headings, *rows = sheet.marked()
            show(headings, rows, [sheet.caption, *sheet.lines()])


@app.command(
    epilog=examples(
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
    from etcbench.figures import score_rows
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
