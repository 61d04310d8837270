"""The application object, and what the commands share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from etcbench.environment import installed_version

if TYPE_CHECKING:
    from etcbench.report import Table

app = typer.Typer(
    name="etcbench",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"etcbench {installed_version('etcbench')}")
        raise typer.Exit


@app.callback()
def etcbench(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Benchmark visual-token compression in vision-language models."""


Methods = Annotated[
    list[str],
    typer.Option(help="Methods or presets, comma-separated or repeated; see list methods."),
]
Budgets = Annotated[
    list[str] | None,
    typer.Option(
        help="Budgets: 64 (layer-averaged), kept:64 (after the drop), 1/9 (of each picture)."
    ),
]
Model = Annotated[
    str | None,
    typer.Option(help="Embedded model, directory or hub id; default: the embedded micro model."),
]
Checkpoint = Annotated[str | None, typer.Option(help="Weights of a trained method (a folder).")]
Untrained = Annotated[
    bool, typer.Option("--untrained", help="Run a trained method with random weights.")
]
MethodOptions = Annotated[
    list[str] | None, typer.Option(help="KEY=VALUE for the methods that have such an option.")
]
Seed = Annotated[int, typer.Option(help="Seed of random weights and random methods.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")]
AttentionBackend = Annotated[str, typer.Option(help="sdpa or eager.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Partial = Annotated[
    bool, typer.Option("--partial", help="Show scores although samples are missing, with n.")
]
Split = Annotated[str | None, typer.Option(help="Split of the data; default: the benchmark's.")]


def examples(*commands: str) -> str:
    """Write example commands for the end of a help text."""
    # \b keeps the lines as they are
    return "\b\nExample:\n" + "\n".join(f"  {command}" for command in commands)


def split_list(texts: Iterable[str] | None) -> list[str]:
    """Flatten repeated, comma-separated values, each once."""
    parts = (part.strip() for text in texts or () for part in text.split(","))
    return list(dict.fromkeys(part for part in parts if part))


def print_table(table: Table) -> None:
    """Print a table of runs with its notes; only the notes where nothing is shown."""
    from etcbench.console import show

    if table.rows:
        show(table.columns, table.rows, table.notes)
    elif table.notes:
        print("\n".join(table.notes))
