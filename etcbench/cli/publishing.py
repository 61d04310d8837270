"""``etcbench push``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from etcbench.cli.app import app, examples


@app.command(
    epilog=examples(
        "etcbench push runs/training/etc/result OWNER/etc-llava-1.5-7b --dry-run",
        "etcbench push runs/training/etc/result OWNER/etc-llava-1.5-7b --private",
    )
)
def push(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a trained method.")],
    repository: Annotated[str, typer.Argument(help="Hub id, OWNER/NAME.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new one private.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and list the files; push nothing.")
    ] = False,
) -> None:
    """Push a checkpoint to the hub, where `--checkpoint OWNER/NAME` finds it.

    Takes the token of `hf auth login`, or HF_TOKEN. Config, weights, model card and adapter are
    pushed; nothing else in the folder.
    """
    from etcbench.console import notice
    from etcbench.publish import prepare
    from etcbench.publish import push as push_to_hub

    if dry_run:
        planned = prepare(checkpoint, repository)
        notice(f"would push to {planned.repository}: {planned.message}")
    else:
        planned, address = push_to_hub(checkpoint, repository, private=private)
        notice(f"pushed {planned.message}: {address}")
    for name, size in planned.files.items():
        print(f"{name}\t{size}")
