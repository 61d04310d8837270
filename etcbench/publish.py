"""Push a checkpoint to the hub, so that ``--checkpoint OWNER/NAME`` finds it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etcbench.checkpoints import CARD, CONFIG, WEIGHTS
from etcbench.errors import UsageError

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class Publication:
    """What is or would be pushed.

    Attributes
    ----------
    repository : str
        Hub id.
    files : mapping of str to int
        Bytes of each file.
    message : str
        Message of the commit.
    """

    repository: str
    files: Mapping[str, int]
    message: str


def prepare(folder: Path, repository: str) -> Publication:
    """Check that a folder is a whole checkpoint, and list what belongs to it.

    Raises
    ------
    UsageError
        If a file is missing or does not parse, or the id is not of the form OWNER/NAME.
    """
    owner, _, name = repository.partition("/")
    if not owner or not name or "/" in name:
        raise UsageError(f"{repository!r} is no hub id; write OWNER/NAME")
    if missing := [file for file in (CONFIG, WEIGHTS, CARD) if not (folder / file).is_file()]:
        raise UsageError(f"{folder} is no checkpoint: it has no {', '.join(missing)}")
    try:
        config = json.loads((folder / CONFIG).read_text())
        tokens = f"at {config['tokens']} tokens " if config["tokens"] else ""
        message = f"{config['method']} {tokens}for {config['backbone']['name']}"
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder / CONFIG} does not parse: {error}") from error
    names = [CARD, CONFIG, WEIGHTS, *(file for file in ADAPTER if (folder / file).is_file())]
    return Publication(repository, {n: (folder / n).stat().st_size for n in names}, message)


def push(
    folder: Path, repository: str, *, private: bool = False, hub: Any | None = None
) -> tuple[Publication, str]:
    """Create the repository if there is none, and commit the checkpoint's files in one commit.

    Parameters
    ----------
    folder : Path
        The checkpoint.
    repository : str
        Hub id, OWNER/NAME.
    private : bool
        Whether a new repository is private.
    hub : huggingface_hub.HfApi, optional
        Default: the public hub, with the token of ``hf auth login``.

    Returns
    -------
    Publication, str
        What was pushed, and the commit's address.

    Raises
    ------
    UsageError
        As `prepare`; if the hub refuses or cannot be reached.
    """
    planned = prepare(folder, repository)
    if hub is None:
        from huggingface_hub import HfApi

        hub = HfApi()
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        commit = hub.upload_folder(
            repo_id=repository,
            folder_path=str(folder),
            allow_patterns=list(planned.files),
            commit_message=planned.message,
        )
    except Exception as error:  # the hub's and its transport's errors have no common class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"{repository} cannot be pushed: {reason}") from error
    return planned, str(commit.commit_url)
