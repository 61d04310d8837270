"""Low-rank adapters on the language model: added with peft, stored as peft does, merged on load.

A checkpoint keeps the adapter as ``adapter_config.json`` and ``adapter_model.safetensors``, which
`peft.PeftModel.from_pretrained` reads too. For evaluation it is merged into the weights it adapts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from etcbench.errors import UsageError
from etcbench.options import require_positive

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # in front of every name in peft's files
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
# Of peft's settings those under which a weight changes by more than alpha / rank times A and B.
BEYOND = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out")


@dataclass(frozen=True)
class LoRA:
    """A low-rank adapter (spec abstractive 1.6).

    Attributes
    ----------
    rank, alpha : int, float
        Rank, and the factor alpha / rank of its product.
    dropout : float
        In front of it, while training.
    targets : tuple of str
        Linear layers of every decoder layer that get one.
    """

    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip

    def __post_init__(self) -> None:
        require_positive("lora", rank=self.rank)
        if not 0 <= self.dropout < 1:
            raise UsageError(
                f"lora: dropout is a share of at least 0 and below 1, not {self.dropout}"
            )

    def config(self) -> Any:
        """Write the same as peft's `LoraConfig`."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            # a vision tower may have layers of the same names
            target_modules=rf".*\blanguage_model\..*\.({'|'.join(self.targets)})",
        )


def add_adapter(model: nn.Module, lora: LoRA) -> None:
    """Put an adapter, which changes nothing yet, on a model.

    Raises
    ------
    UsageError
        If the model has no such layers.
    """
    from peft import inject_adapter_in_model

    try:
        inject_adapter_in_model(lora.config(), model)
    except ValueError as error:
        raise UsageError(f"lora: the model has no layers {', '.join(lora.targets)}") from error


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def save_adapter(folder: Path, lora: LoRA, weights: Mapping[str, Tensor]) -> None:
    """Write an adapter in peft's format.

    Parameters
    ----------
    weights : mapping of str to Tensor
        Its parameters by their names in the backbone's model.
    """
    lora.config().save_pretrained(folder)
    stored = {PREFIX + name.replace(".default.", "."): value for name, value in weights.items()}
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})


def merged_adapter(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """Compute what a model's weights become with the adapter of a checkpoint.

    Parameters
    ----------
    model : nn.Module
        The model without adapter; stays as it is.
    folder : Path
        The checkpoint; may have none.

    Returns
    -------
    dict of str to Tensor
        Changed weights by name, fp32.

    Raises
    ------
    UsageError
        If the adapter does not load, does not fit the model, or is more than a low-rank product.
    """
    if not (folder / CONFIG).is_file():
        return {}
    weights, factor = _read(folder)
    merged = {}
    for key in filter(lambda key: key.endswith(DOWN), weights):
        name = key.removeprefix(PREFIX).removesuffix(DOWN) + ".weight"
        down, up = weights[key].float(), weights[key.removesuffix(DOWN) + UP].float()
        try:
            base = model.get_parameter(name).detach()
        except AttributeError as error:
            raise UsageError(f"{folder / WEIGHTS}: the model has no {name}") from error
        if base.shape != (up.shape[0], down.shape[1]):
            raise UsageError(f"{folder / WEIGHTS}: {name} has another shape in the model")
        merged[name] = base.float() + ((up @ down) * factor).to(base.device)
    return merged


def _read(folder: Path) -> tuple[dict[str, Tensor], float]:
    """Read an adapter's weights, in pairs, and the factor of their products."""
    try:
        config = json.loads((folder / CONFIG).read_text())
        rank = config["r"] ** 0.5 if config.get("use_rslora") else config["r"]
        factor = config["lora_alpha"] / rank
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UsageError(f"{folder / CONFIG} is no adapter's of low rank: {error!r}") from error
    if beyond := [name for name in BEYOND if config.get(name)]:
        raise UsageError(
            f"{folder / CONFIG} has {', '.join(beyond)}, which are not read here; merge the "
            "adapter with peft, or train one without"
        )
    try:
        weights = load_file(folder / WEIGHTS)
    except (FileNotFoundError, SafetensorError) as error:
        raise UsageError(f"{folder / WEIGHTS} does not load: {error}") from error
    for key in weights:
        half, other = (DOWN, UP) if key.endswith(DOWN) else (UP, DOWN)
        if not key.endswith(half) or key.removesuffix(half) + other not in weights:
            raise UsageError(f"{folder / WEIGHTS}: {key} is no half of a low-rank product")
    return weights, factor
