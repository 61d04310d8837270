"""The command line. Every heavy import happens inside a command, so that help is immediate."""

from __future__ import annotations

import sys
from typing import Any

import typer

from etcbench.cli import (
    check,
    inspect,
    measure,
    publishing,
    reproduce,
    run,
    tables,
    training,
    upkeep,
)
from etcbench.cli.app import app
from etcbench.errors import UsageError

__all__ = [
    "app",
    "check",
    "inspect",
    "main",
    "measure",
    "publishing",
    "reproduce",
    "run",
    "tables",
    "training",
    "upkeep",
]

INTERRUPTED = 130  # the shell's code for Ctrl-C; typer returns it for a KeyboardInterrupt


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
