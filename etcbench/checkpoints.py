"""Weights of trained methods: a directory with a config, safetensors and a model card.

A checkpoint holds only what differs from the backbone: the method's own parameters
(``compressor.*``) and the backbone weights it tuned (``model.*``), in half precision or as
differences of 8 or 4 bits (`etcbench.deltas`). A directory without our config is read as the
method's original release (`etcbench.released`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from etcbench import deltas, registry, released
from etcbench.adapters import merged_adapter
from etcbench.backbones.base import Backbone
from etcbench.backbones.loading import MICRO_MODELS
from etcbench.compressor import Budget, Compressor
from etcbench.errors import MissingCheckpointError, UsageError
from etcbench.model_card import model_card

CONFIG, WEIGHTS, CARD = "compressor_config.json", "model.safetensors", "README.md"
# A method without weights of its own is served by a model that was tuned without one.
PLAIN = "full"
PARTS = ("*.json", "*.safetensors", "*.md", "*.txt")
OTHER_WEIGHTS = ("*.bin", "*.pth")
SHAPE = ("family", "layers", "hidden", "heads", "kv_heads", "visual_tokens")


def save_checkpoint(
    path: Path,
    compressor: Compressor,
    backbone: Backbone,
    weights: dict[str, Tensor],
    recipe: dict[str, Any],
    base: Mapping[str, Tensor] | None = None,
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
        How it was trained, for the model card. Its ``storage`` says how the tuned matrices are
        kept: ``"half"`` (default) or, as differences to ``base``, ``"delta8"`` or ``"delta4"``.
    base : mapping of str to Tensor, optional
        The backbone's own weights from before the training, ``model.*``; needed for differences.

    Raises
    ------
    ValueError
        If the recipe stores differences and there is no ``base``.
    """
    storage = recipe.get("storage", deltas.HALF)
    stored = dict(weights)
    if storage != deltas.HALF:
        if base is None:
            raise ValueError(f"storage {storage!r} needs the weights from before the training")
        stored = deltas.encode(weights, base, storage)
    path.mkdir(parents=True, exist_ok=True)
    stored = {name: _compact(value).contiguous() for name, value in stored.items()}
    save_file(stored, path / WEIGHTS, metadata={"format": "pt"})
    config = {
        "method": compressor.name(),
        "tokens": str(compressor.budget) if compressor.budget else None,
        "options": recipe.get("options", {}),
        "storage": storage,
        "backbone": {**backbone.identity, **{name: getattr(backbone.spec, name) for name in SHAPE}},
        "recipe": recipe,
    }
    (path / CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    (path / CARD).write_text(model_card(config, weights))


def _compact(value: Tensor) -> Tensor:
    value = value.detach().cpu()
    return value if value.dtype in (torch.bfloat16, torch.int8, torch.uint8) else value.half()


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
    if untrained and checkpoint:
        raise UsageError("--untrained and --checkpoint exclude each other")
    needed = kind.needs_weights(chosen)
    if not needed and checkpoint is None:
        return _built(kind, budget, backbone, chosen), {}
    if untrained:
        return _built(kind, budget, backbone, chosen), {"untrained": "yes"}
    if needed and kind.takes_budget and budget is None and not kind.budget_in(chosen):
        raise UsageError(f"{name} needs a budget: add --tokens N")
    folder = _find(kind, budget, backbone, checkpoint)
    if (folder / CONFIG).is_file():
        compressor = _from_checkpoint(kind, budget, backbone, folder, chosen)
    else:
        compressor = _from_release(kind, budget, backbone, folder, chosen)
    return compressor, {"checkpoint": folder.name, "content": _digest(folder)}


def _built(
    kind: type[Compressor], budget: Budget | None, backbone: Backbone, options: dict[str, Any]
) -> Compressor:
    compressor = kind.from_budget(budget, backbone.spec, **options)
    compressor.attach(backbone)
    if compressor.module is not None:
        compressor.module.eval()
    return compressor


@contextmanager
def installed(compressor: Compressor, backbone: Backbone) -> Iterator[None]:
    """Put a method's tuned backbone weights in place, and the original ones back at the end."""
    original: dict[str, Tensor] = {}
    try:
        with torch.no_grad():
            for name, value in compressor.tuned.items():
                parameter = backbone.model.get_parameter(name)
                # Beside a whole tuned model the original would not fit the accelerator twice.
                original[name] = parameter.detach().to("cpu", copy=True)
                parameter.copy_(value)
        if compressor.module is not None:
            compressor.module.to(backbone.device).eval()
        yield
    finally:
        with torch.no_grad():
            for name, data in original.items():
                backbone.model.get_parameter(name).copy_(data)


def shipped(model: str) -> list[Path]:
    """Checkpoints that come with an embedded model."""
    return sorted(path.parent for path in (MICRO_MODELS / model).glob(f"compressors/*/{CONFIG}"))


def _find(
    kind: type[Compressor], budget: Budget | None, backbone: Backbone, checkpoint: str | None
) -> Path:
    if checkpoint is None:
        return _embedded(kind, budget, backbone.spec.name)
    if Path(checkpoint).is_dir():
        return Path(checkpoint)
    if "/" not in checkpoint or checkpoint.startswith((".", "/")):
        raise UsageError(f"--checkpoint {checkpoint}: there is no such directory")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = checkpoint.partition("@")

    def fetch(patterns: tuple[str, ...]) -> Path:
        return Path(
            snapshot_download(name, revision=revision or None, allow_patterns=list(patterns))
        )

    try:
        folder = fetch(PARTS)
        if not any(folder.glob("*.safetensors")):
            folder = fetch((*PARTS, *OTHER_WEIGHTS))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        # A mistyped path is no hub id; the hub's own rules for names would only distract.
        known = isinstance(error, HFValidationError)
        reason = "" if known else f" ({str(error).splitlines()[0]})"
        raise UsageError(
            f"--checkpoint {checkpoint}: no such directory or hub id{reason}"
        ) from error
    return folder


def _embedded(kind: type[Compressor], budget: Budget | None, model: str) -> Path:
    """Checkpoint of an embedded model that serves a budget."""
    mine = [path for path in shipped(model) if _read_config(path).get("method") == kind.name()]
    for path in sorted(mine, key=lambda path: _tokens(_read_config(path))):
        if _serves(kind, _read_config(path), budget):
            return path
    known = f" (it has {', '.join(path.name for path in mine)})" if mine else ""
    asked = "" if budget is None else f" at {budget} tokens"
    raise MissingCheckpointError(
        f"{kind.name()}{asked} is trained, and there is no checkpoint for {model}{known}: "
        "give one with --checkpoint, make one with etcbench train, or look at random weights "
        "with --untrained"
    )


def _tokens(config: dict[str, Any]) -> int:
    return Budget.parse(config["tokens"]).tokens if config.get("tokens") else 0


def _serves(kind: type[Compressor], config: dict[str, Any], budget: Budget | None) -> bool:
    """Whether weights trained for one budget serve another."""
    if kind.any_budget or not kind.takes_budget:
        return True
    return config.get("tokens") == (str(budget) if budget else None)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / CONFIG).read_text()))
    except FileNotFoundError as error:
        raise UsageError(f"{folder} is no checkpoint: it has no {CONFIG}") from error
    except (ValueError, TypeError) as error:
        raise UsageError(f"{folder / CONFIG} does not parse: {error}") from error


def _from_checkpoint(
    kind: type[Compressor],
    budget: Budget | None,
    backbone: Backbone,
    folder: Path,
    options: dict[str, Any],
) -> Compressor:
    """Build a method and fill it from a checkpoint of ours, as far as the two fit."""
    config = _read_config(folder)
    _require_match(folder, config, kind, budget, backbone)
    if own := config.get("method") == kind.name():
        options = {**config.get("options", {}), **options}
    compressor = _built(kind, budget, backbone, options)
    try:
        weights = load_file(folder / WEIGHTS)
    except (FileNotFoundError, SafetensorError) as error:
        raise UsageError(f"{folder / WEIGHTS} does not load: {error}") from error
    wanted = _parameters(compressor, backbone)
    if config.get("storage") in deltas.LARGEST:
        weights = deltas.decode(weights, wanted)
    for key, value in weights.items():
        if key not in wanted or wanted[key].shape != value.shape:
            raise UsageError(
                f"{folder / WEIGHTS}: {key} {list(value.shape)} is not part of the model"
            )
    missing = [key for key in wanted if key.startswith("compressor.") and key not in weights]
    if own and missing:
        raise UsageError(f"{folder / WEIGHTS} lacks {', '.join(missing)}")
    _fill(compressor, weights)
    compressor.tuned.update(merged_adapter(backbone.model, folder))
    return compressor


def _from_release(
    kind: type[Compressor],
    budget: Budget | None,
    backbone: Backbone,
    folder: Path,
    options: dict[str, Any],
) -> Compressor:
    """Build a method and fill it from the weights that its authors released."""
    keys = kind.released
    if keys is None and not kind.trained:
        keys = released.LLAVA
    if keys is None:
        raise UsageError(f"{folder} is no checkpoint: it has no {CONFIG}")
    if backbone.model_type != "llava":
        raise UsageError(
            f"{folder} has no {CONFIG}, and weights that authors released are for LLaVA-1.5, not "
            f"for {backbone.spec.name}"
        )
    options = {**keys.options(released.read_config(folder)), **options}
    compressor = _built(kind, budget, backbone, options)
    _fill(compressor, keys.load(folder, _parameters(compressor, backbone)))
    return compressor


def _require_match(
    folder: Path,
    config: dict[str, Any],
    kind: type[Compressor],
    budget: Budget | None,
    backbone: Backbone,
) -> None:
    """Refuse a checkpoint of another method, budget or backbone."""
    # A model tuned without a method is one on which any that needs no weights can run.
    plain = not kind.trained and config.get("method") == PLAIN
    wanted: dict[str, Any] = {"method": PLAIN if plain else kind.name()}
    wanted |= {key: getattr(backbone.spec, key) for key in SHAPE}
    for key in ("weights", "revision"):
        if key in backbone.identity:
            wanted[key] = backbone.identity[key]
    found = {**config.get("backbone", {}), "method": config.get("method")}
    differ = [
        f"{key} {found[key]} instead of {value}"
        for key, value in wanted.items()
        if key in found and found[key] != value
    ]
    if not plain and not _serves(kind, config, budget):
        differ.append(f"tokens {config.get('tokens')} instead of {budget}")
    if differ:
        raise UsageError(f"checkpoint {folder} does not fit: it has {'; '.join(differ)}")


def _parameters(compressor: Compressor, backbone: Backbone) -> dict[str, Tensor]:
    """Everything that a checkpoint may hold, under its names there."""
    own = {} if compressor.module is None else compressor.module.state_dict()
    return {
        **{f"compressor.{name}": value for name, value in own.items()},
        **{f"model.{name}": value.detach() for name, value in backbone.model.named_parameters()},
    }


def _fill(compressor: Compressor, weights: dict[str, Tensor]) -> None:
    """Load the method's parameters and note the tuned backbone weights."""
    own: dict[str, Tensor] = {}
    for key, value in weights.items():
        part, _, name = key.partition(".")
        if part == "compressor":
            own[name] = value.float()
        else:
            compressor.tuned[name] = value
    if compressor.module is not None:
        compressor.module.load_state_dict(own)


def _digest(folder: Path) -> str:
    """Hash the weights of a checkpoint, whatever their files are called."""
    digest = hashlib.sha256()
    for file in released.weight_files(folder):
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()[:16]
