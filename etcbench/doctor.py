"""What is installed, what is missing and what each part is for; fetching for offline use."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etcbench.environment import checkout, device_name, package_versions
from etcbench.errors import UsageError

# module to look for -> (extra that brings it, what it is for)
EXTRAS = {
    "lmms_eval": ("lmms", "run lmms-eval's tasks, and our models under lmms-eval"),
    "pycocoevalcap": ("caption", "BLEU, METEOR, ROUGE-L and the original tokenizer of captions"),
    "pytest": ("test", "run the tests"),
    "ruff": ("dev", "check the style of the code"),
}


def examine() -> dict[str, Any]:
    """Collect the state of this installation.

    Returns
    -------
    dict
        ``versions``, ``git``, ``device``, ``embedded``, ``hub_cache`` and ``extras``.
    """
    import torch

    from etcbench.backbones.loading import micro_models
    from etcbench.checkpoints import shipped
    from etcbench.loading import MICRO

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "versions": package_versions(),
        "git": checkout(),
        "device": {
            "name": device_name(device),
            "count": torch.cuda.device_count() or 1,
            "dtype": "bfloat16" if device == "cuda" else "float32",
            "threads": torch.get_num_threads(),
        },
        "embedded": {
            "models": micro_models(),
            "data": sorted(str(path.relative_to(MICRO)) for path in MICRO.glob("**/*.parquet")),
            "checkpoints": [
                f"{path.name} for {model}" for model in micro_models() for path in shipped(model)
            ],
        },
        "hub_cache": _hub_cache(),
        "extras": [
            {
                "extra": extra,
                "for": purpose,
                "installed": importlib.util.find_spec(module) is not None,
                "install": f'pip install -e ".[{extra}]"',
            }
            for module, (extra, purpose) in EXTRAS.items()
        ],
        "java": shutil.which("java") is not None,
    }


def as_rows(state: dict[str, Any]) -> list[list[str]]:
    """Turn the state into (what, found) pairs of text."""
    git, device, embedded = state["git"], state["device"], state["embedded"]
    rows = [[name, version or "missing"] for name, version in state["versions"].items()]
    if git:
        rows.append(["checkout", git["commit"] + (" with changes" if git["dirty"] else "")])
    rows += [
        ["device", f"{device['count']} x {device['name']}, {device['threads']} threads"],
        ["default dtype", device["dtype"]],
        ["embedded models", ", ".join(embedded["models"]) or "none"],
        ["embedded data", ", ".join(embedded["data"]) or "none"],
        ["embedded checkpoints", ", ".join(embedded["checkpoints"]) or "none"],
        ["hub cache", state["hub_cache"]["folder"]],
        ["cached models and data", ", ".join(state["hub_cache"]["repositories"]) or "none"],
    ]
    for extra in state["extras"]:
        found = "installed" if extra["installed"] else f"missing: {extra['install']}"
        rows.append([f"extra {extra['extra']}", f"{found} ({extra['for']})"])
    java = "installed" if state["java"] else "missing"
    rows.append(["java", f"{java} (METEOR, and the original tokenizer of captions)"])
    return rows


def fetch(model: str | None, tasks: Sequence[str], split: str | None = None) -> list[str]:
    """Download what later offline runs need into the hub cache.

    Parameters
    ----------
    model : str or None
        Hub id of a model.
    tasks : sequence of str
        Benchmarks whose data to download.
    split : str, optional
        Split of the data; the benchmark's own by default.

    Returns
    -------
    list of str
        What is now there, one line each.

    Raises
    ------
    UsageError
        If there is nothing to fetch or a download fails.
    """
    from huggingface_hub import snapshot_download

    from etcbench.loading import load_task, make_task

    if model is None and not tasks:
        raise UsageError("nothing to fetch; name a model with --model or benchmarks with --task")
    for task in tasks:
        make_task(task)
    done = []
    if model is not None:
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        try:
            where = snapshot_download(model, allow_patterns=patterns, token=False)
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise UsageError(f"cannot download {model}: {reason}") from error
        done.append(f"{model}: {where}")
    for task in tasks:
        loaded = load_task(task, "hub", split=split)
        done.append(f"{task}: {len(loaded.docs)} samples, {loaded.fingerprint}")
    return done


def _hub_cache() -> dict[str, Any]:
    from huggingface_hub import CacheNotFound, scan_cache_dir
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        found = scan_cache_dir()
    except CacheNotFound:
        return {"folder": f"{Path(HF_HUB_CACHE)} (empty)", "repositories": []}
    names = sorted(f"{repo.repo_id} ({repo.size_on_disk_str})" for repo in found.repos)
    return {"folder": str(Path(HF_HUB_CACHE)), "repositories": names}
