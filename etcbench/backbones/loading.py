"""Load a backbone from a name of the embedded models, a directory, or the hub."""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import etcbench.backbones as package
from etcbench.backbones.base import Backbone
from etcbench.errors import UsageError, unknown_name

MICRO_MODELS = Path(__file__).parent.parent / "micro" / "models"


def micro_models() -> list[str]:
    """Names of the embedded models."""
    return sorted(path.parent.name for path in MICRO_MODELS.glob("*/config.json"))


def families() -> dict[str, type[Backbone]]:
    """Map each supported ``model_type`` to its backbone class."""
    found = {}
    for module in pkgutil.iter_modules(package.__path__):
        backbone = getattr(
            importlib.import_module(f"{package.__name__}.{module.name}"), "BACKBONE", None
        )
        if backbone is not None:
            found[backbone.model_type] = backbone
    return found


def load_backbone(
    model: str | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    attention: str = "sdpa",
    **options: str,
) -> Backbone:
    """Load a model and wrap it.

    Parameters
    ----------
    model : str, optional
        Name of an embedded model, directory, or hub id; default: the first embedded model.
    device : str, optional
        Default: ``"cuda"`` where there is one, else ``"cpu"``.
    dtype : str, optional
        Default: ``"float32"`` on the CPU, ``"bfloat16"`` elsewhere.
    attention : {"sdpa", "eager"}
        Attention backend.
    **options : str
        Preprocessing choices of the family (`Backbone.default_options`).

    Raises
    ------
    UsageError
        If there is no such model, its directory lacks weights, or its family is not supported.
    """
    import transformers

    model = model or default_model()
    source, name = _resolve(model)
    try:
        config = transformers.AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        if "/" not in model and not Path(model).exists():
            raise unknown_name("model", model, micro_models()) from error
        raise UsageError(f"model {model!r} cannot be loaded: {_first_line(error)}") from error
    known = families()
    if config.model_type not in known:
        raise UsageError(
            f"model {model!r} is of type {config.model_type!r}; supported: "
            f"{', '.join(sorted(known))} (docs/add-a-backbone.md says how to add one)"
        )
    family = known[config.model_type]
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    precision = getattr(torch, dtype or ("float32" if device == "cpu" else "bfloat16"))
    try:
        loaded: Any = transformers.AutoModelForImageTextToText.from_pretrained(
            source, dtype=precision, attn_implementation=attention
        )
        processor = transformers.AutoProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UsageError(f"model {model!r} cannot be loaded: {_first_line(error)}") from error
    return family(
        model=loaded.to(device).eval(),
        processor=processor,
        spec=family.spec_of(config, name),
        identity={"name": name, **_origin(source)},
        options=resolve_options(family, options),
    )


def default_model() -> str:
    """Name of the embedded model that is used when none is named.

    Raises
    ------
    UsageError
        If no embedded model is installed.
    """
    names = micro_models()
    if not names:
        raise UsageError("no embedded model is installed; name one with --model")
    return names[0]


def resolve_options(family: type[Backbone], options: dict[str, str]) -> dict[str, str]:
    """Fill in the defaults of a family's preprocessing choices and refuse unknown ones."""
    known = family.default_options()
    for key, value in options.items():
        if key not in known:
            raise unknown_name(f"{family.model_type} option", key, known)
        if value not in known[key]:
            raise unknown_name(f"value of option {key}", value, known[key])
    return {key: options.get(key, values[0]) for key, values in known.items()}


def _resolve(model: str) -> tuple[str, str]:
    """Return what transformers loads and the name for tables."""
    if model in micro_models():
        return str(MICRO_MODELS / model), model
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"model directory {model} has no config.json")
        if not any(path.glob("*.safetensors")):
            raise UsageError(
                f"model directory {model} has no weights: expected model.safetensors "
                "(or its shards) beside config.json"
            )
        return str(path), path.resolve().name
    return model, model.rpartition("/")[2] or model


def _origin(source: str) -> dict[str, str]:
    """Identify what was loaded: hashes of a directory's weights and settings, or the revision."""
    path = Path(source)
    if path.is_dir():
        settings = [f for f in path.glob("*") if f.suffix in (".json", ".jinja", ".model")]
        return {
            "weights": _digest(path.glob("*.safetensors")),
            "settings": _digest(settings),
        }
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(source, "config.json")
    return {"hub": source, "revision": Path(str(cached)).parent.name}


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()[:16]


def _first_line(error: Any) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
