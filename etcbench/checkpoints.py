"""Weights of trained methods: a directory with a config, safetensors and a model card.

A checkpoint holds only what differs from the backbone: the method's own parameters
(``compressor.*``) and the backbone weights it tuned (``model.*``), in half precision.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from etcbench import registry
from etcbench.backbones.base import Backbone
from etcbench.backbones.loading import MICRO_MODELS
from etcbench.compressor import Budget, Compressor
from etcbench.errors import MissingCheckpointError, UsageError

CONFIG, WEIGHTS, CARD = "compressor_config.json", "model.safetensors", "README.md"
SHAPE = ("family", "layers", "hidden", "heads", "kv_heads", "visual_tokens")


def save_checkpoint(
    path: Path,
    compressor: Compressor,
    backbone: Backbone,
    weights: dict[str, Tensor],
    recipe: dict[str, Any],
) -> None:
    """Write a checkpoint.

    Parameters
    ----------
    path : Path
        Directory to create.
    compressor : Compressor
        The trained method.
    backbone : Backbone
        What it was trained on.
    weights : dict of str to Tensor
        ``compressor.*`` and ``model.*``.
    recipe : dict
        How it was trained, for the model card.
    """
    path.mkdir(parents=True, exist_ok=True)
    half = {name: value.detach().cpu().half().contiguous() for name, value in weights.items()}
    save_file(half, path / WEIGHTS, metadata={"format": "pt"})
    config = {
        "method": compressor.name(),
        "tokens": str(compressor.budget) if compressor.budget else None,
        "options": recipe.get("options", {}),
        "backbone": {**backbone.identity, **{name: getattr(backbone.spec, name) for name in SHAPE}},
        "recipe": recipe,
    }
    (path / CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    (path / CARD).write_text(_card(config, half))


def load_method(
    name: str,
    budget: Budget | None,
    backbone: Backbone,
    *,
    checkpoint: str | None = None,
    untrained: bool = False,
    options: dict[str, Any] | None = None,
) -> tuple[Compressor, dict[str, str]]:
    """Build a method for a backbone, with its weights if it needs any.

    Parameters
    ----------
    name : str
        Method.
    budget : Budget or None
        Token budget.
    backbone : Backbone
        The model.
    checkpoint : str, optional
        Directory or hub id; embedded models bring checkpoints of their own.
    untrained : bool
        Use random weights for what is not trained.
    options : dict, optional
        Options of the method; a checkpoint's own come first.

    Returns
    -------
    Compressor, dict of str to str
        The method, and the identity of its weights for the record.

    Raises
    ------
    MissingCheckpointError
        If the method needs weights and there are none.
    UsageError
        If the checkpoint does not fit the backbone, method or budget; names the difference.
    """
    kind: type[Compressor] = registry.load("baselines", name)
    chosen = dict(options or {})
    if not kind.needs_weights(chosen):
        if checkpoint:
            raise UsageError(f"{name} needs no training; leave out --checkpoint")
        return kind.from_budget(budget, backbone.spec, **chosen), {}
    if untrained:
        if checkpoint:
            raise UsageError("--untrained and --checkpoint exclude each other")
        return kind.from_budget(budget, backbone.spec, **chosen), {"untrained": "yes"}
    if budget is None:
        raise UsageError(f"{name} needs a budget: add --tokens N")
    folder = _find(name, budget, backbone, checkpoint)
    config = _read_config(folder)
    _require_match(folder, config, name, budget, backbone)
    compressor = kind.from_budget(budget, backbone.spec, **{**config["options"], **chosen})
    _fill(compressor, backbone, folder)
    return compressor, {"checkpoint": folder.name, "content": _digest(folder / WEIGHTS)}


@contextmanager
def installed(compressor: Compressor, backbone: Backbone) -> Iterator[None]:
    """Put a method's tuned backbone weights in place, and the original ones back at the end."""
    original: dict[str, Tensor] = {}
    try:
        for name, value in compressor.tuned.items():
            parameter = backbone.model.get_parameter(name)
            original[name] = parameter.data
            parameter.data = value.to(parameter)
        if compressor.module is not None:
            compressor.module.to(backbone.device)
        yield
    finally:
        for name, data in original.items():
            backbone.model.get_parameter(name).data = data


def shipped(model: str) -> list[Path]:
    """Checkpoints that come with an embedded model."""
    return sorted(path.parent for path in (MICRO_MODELS / model).glob(f"compressors/*/{CONFIG}"))


def _find(name: str, budget: Budget, backbone: Backbone, checkpoint: str | None) -> Path:
    model = backbone.spec.name
    if checkpoint is None:
        own = MICRO_MODELS / model / "compressors" / f"{name}-{budget.tokens}"
        if (own / CONFIG).is_file():
            return own
        offered = [path.name for path in shipped(model) if path.name.startswith(f"{name}-")]
        known = f" (it has {', '.join(offered)})" if offered else ""
        raise MissingCheckpointError(
            f"{name} at {budget} tokens is trained, and there is no checkpoint for {model}{known}: "
            "give one with --checkpoint, make one with etcbench train, or look at random weights "
            "with --untrained"
        )
    if Path(checkpoint).is_dir():
        return Path(checkpoint)
    if "/" not in checkpoint or checkpoint.startswith((".", "/")):
        raise UsageError(f"--checkpoint {checkpoint}: there is no such directory")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(checkpoint))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"--checkpoint {checkpoint}: no such directory or hub id ({reason})"
        ) from error


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / CONFIG).read_text()))
    except FileNotFoundError as error:
        raise UsageError(f"{folder} is no checkpoint: it has no {CONFIG}") from error
    except (json.JSONDecodeError, TypeError) as error:
        raise UsageError(f"{folder / CONFIG} does not parse: {error}") from error


def _require_match(
    folder: Path, config: dict[str, Any], name: str, budget: Budget, backbone: Backbone
) -> None:
    """Refuse a checkpoint of another method, budget or backbone."""
    wanted = {"method": name, "tokens": str(budget)}
    wanted |= {key: getattr(backbone.spec, key) for key in SHAPE}
    for key in ("weights", "revision"):
        if key in backbone.identity:
            wanted[key] = backbone.identity[key]
    found = {**config.get("backbone", {}), **{key: config.get(key) for key in ("method", "tokens")}}
    differ = [
        f"{key} {found[key]} instead of {value}"
        for key, value in wanted.items()
        if key in found and found[key] != value
    ]
    if differ:
        raise UsageError(f"checkpoint {folder} does not fit: it has {'; '.join(differ)}")


def _fill(compressor: Compressor, backbone: Backbone, folder: Path) -> None:
    """Load the method's parameters and note the tuned backbone weights."""
    try:
        weights = load_file(folder / WEIGHTS)
    except (FileNotFoundError, SafetensorError) as error:
        raise UsageError(f"{folder / WEIGHTS} does not load: {error}") from error
    known = dict(backbone.model.named_parameters())
    own: dict[str, Tensor] = {}
    for key, value in weights.items():
        part, _, name = key.partition(".")
        if part == "compressor":
            own[name] = value.float()
        elif part == "model" and name in known and known[name].shape == value.shape:
            compressor.tuned[name] = value
        else:
            raise UsageError(
                f"{folder / WEIGHTS}: {key} {list(value.shape)} is not part of the model"
            )
    assert compressor.module is not None
    try:
        compressor.module.load_state_dict(own)
    except RuntimeError as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[1:])
        raise UsageError(
            f"{folder / WEIGHTS} does not fit {compressor.name()}: {reason}"
        ) from error


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def _card(config: dict[str, Any], weights: dict[str, Tensor]) -> str:
    """Write the model card: what it is, what it was trained on, and how."""
    own = sum(v.numel() for k, v in weights.items() if k.startswith("compressor."))
    tuned = sum(v.numel() for k, v in weights.items() if k.startswith("model."))
    backbone, recipe = config["backbone"], config["recipe"]
    return f"""---
library_name: etcbench
tags: [visual-token-compression]
---
# {config["method"]}, {config["tokens"]} tokens, for {backbone["name"]}

A checkpoint of etcbench. Load it with `--checkpoint` or `etcbench.load_compressor`.

* Method parameters: {own:,}; tuned backbone parameters: {tuned:,} (half precision).
* Backbone: {backbone["name"]} ({backbone.get("weights") or backbone.get("revision")}).
* Recipe `{recipe["name"]}`, seed {recipe["seed"]}, data `{recipe["data"]}`; every field is in
  `{CONFIG}`.
"""
