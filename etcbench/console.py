"""What a person watching a run sees: notices and progress, on stderr only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager


def notice(message: str) -> None:
    """Print one line for the person at the terminal; results go to stdout and never here."""
    print(f"etcbench: {message}", file=sys.stderr, flush=True)


@contextmanager
def progress(label: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Show a progress bar while the block runs; silent when stderr is not a terminal.

    Parameters
    ----------
    label : str
        What is being worked on.
    total, done : int
        Steps altogether and those that an earlier process has finished.

    Yields
    ------
    callable
        ``advance(n)`` moves the bar by ``n`` steps.
    """
    if not sys.stderr.isatty():
        yield lambda steps: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
    from rich.text import Text

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(Text(label).markup, total=total, completed=done)
        yield lambda steps: bar.advance(task, steps)


@contextmanager
def waiting(label: str) -> Iterator[None]:
    """Show a spinner during a step of unknown length; silent when stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(label):
        yield


def quiet_libraries() -> None:
    """Keep the libraries' chatter off the terminal, and their progress bars out of logs."""
    import datasets
    import huggingface_hub.utils
    import transformers

    # a failed download is reported once, by the error it ends in
    huggingface_hub.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()


def show(columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> None:
    """Print a table to stdout: drawn for a terminal, as Markdown into a file or a pipe."""
    if sys.stdout.isatty():
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in columns:
            drawn.add_column(Text(column))
        for row in rows:
            drawn.add_row(*map(Text, row))
        Console().print(drawn, *map(Text, notes), sep="\n")
        return
    from tabulate import tabulate

    body = tabulate(rows, columns, tablefmt="pipe", disable_numparse=True)
    print("\n\n".join([body, *notes]))
