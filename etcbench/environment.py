"""What a run ran on: package versions, the checkout, the device."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from etcbench.errors import UsageError, unknown_name

PACKAGES = (
    "etcbench", "torch", "torchvision", "transformers", "tokenizers", "datasets", "safetensors",
    "accelerate", "peft", "numpy", "pandas", "pillow",
)  # fmt: skip
ATTENTION = ("sdpa", "eager")
DTYPES = ("float32", "bfloat16", "float16")


def package_versions(names: tuple[str, ...] = PACKAGES) -> dict[str, str | None]:
    """Versions of installed packages; None for one that is not installed."""
    return {name: installed_version(name) for name in names}


def installed_version(package: str) -> str | None:
    """Version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def checkout() -> dict[str, Any] | None:
    """Commit of the source tree and whether it was changed since; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    top = _git(root, "rev-parse", "--show-toplevel")
    # an installed copy inside somebody else's repository is not a checkout of this one
    if top is None or Path(top).resolve() != root:
        return None
    return {
        "commit": _git(root, "rev-parse", "HEAD"),
        "dirty": bool(_git(root, "status", "--porcelain", "--untracked-files=no")),
    }


def device_name(device: Any) -> str:
    """Name of an accelerator, or the processor's architecture."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.device(device).type} ({platform.machine()})"


def check_device(device: str | None, dtype: str | None, attention: str) -> None:
    """Refuse what a model cannot be loaded with here; None is always fine.

    Raises
    ------
    UsageError
        If there is no such device, precision or attention backend.
    """
    import torch

    if dtype is not None and dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)
    if attention not in ATTENTION:
        raise unknown_name("attention backend", attention, ATTENTION)
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UsageError(
            f"--device {device} cannot be used here: {reason}; leave it out to take what there is"
        ) from error


def describe(backbone: Any) -> dict[str, Any]:
    """Everything about the machine and the software that the manifest records.

    Parameters
    ----------
    backbone : Backbone
        The loaded model.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.system(),
        "packages": package_versions(),
        "git": checkout(),
        "device": device_name(backbone.device),
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "attention": backbone.attention,
    }


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
