"""``etcbench list``, ``doctor`` and ``fetch``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from etcbench.cli.app import Json, Model, Split, app, examples, split_list


@app.command(name="list", epilog=examples("etcbench list methods"))
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
    elif found.rows:
        show(found.columns, found.rows)
    else:
        print(f"no runs in {out}; start one with etcbench run")


@app.command(epilog=examples("etcbench doctor"))
def doctor(as_json: Json = False) -> None:
    """Say what is installed, cached and missing."""
    from etcbench.doctor import as_rows, examine

    state = examine()
    if as_json:
        print(json.dumps(state, indent=2))
    else:
        for what, found in as_rows(state):
            print(f"{what:<24}{found}")


@app.command(epilog=examples("etcbench fetch --model llava-hf/llava-1.5-7b-hf --task mme,pope"))
def fetch(
    model: Model = None,
    task: Annotated[list[str] | None, typer.Option(help="Benchmarks, comma-separated.")] = None,
    split: Split = None,
) -> None:
    """Download what later offline runs need."""
    from etcbench.console import quiet_libraries
    from etcbench.doctor import fetch as download

    quiet_libraries()
    for line in download(model, split_list(task), split):
        print(line)
