"""The model card of a checkpoint: what it is, how to load it, where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml
from torch import Tensor

from etcbench.deltas import LARGEST
from etcbench.environment import checkout, package_versions

VERSIONS = ("etcbench", "torch", "transformers")


def model_card(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str:
    """Write the card.

    Parameters
    ----------
    config : mapping
        ``compressor_config.json``: method, tokens, options, backbone, recipe.
    weights : mapping of str to Tensor
        ``compressor.*`` and ``model.*``.
    """
    own = sum(v.numel() for k, v in weights.items() if k.startswith("compressor."))
    tuned = sum(v.numel() for k, v in weights.items() if k.startswith("model."))
    backbone, recipe = config["backbone"], config["recipe"]
    head: dict[str, Any] = {"library_name": "etcbench", "tags": ["visual-token-compression"]}
    if "hub" in backbone:
        head["base_model"] = backbone["hub"]
    budget = f"{config['tokens']} tokens" if config["tokens"] else "its own budget"
    asked = f" --tokens {config['tokens']}" if config["tokens"] else ""
    versions = ", ".join(f"{k} {v}" for k, v in package_versions(VERSIONS).items() if v)
    return f"""---
{yaml.safe_dump(head, sort_keys=True).strip()}
---
# {config["method"]}, {budget}, for {backbone["name"]}

A checkpoint of etcbench:

    etcbench run --method {config["method"]}{asked} --checkpoint DIRECTORY_OR_HUB_ID \\
        --model {backbone.get("hub", backbone["name"])} --task vqav2

* Method parameters: {own:,}; tuned backbone parameters: {tuned:,} ({_storage(config, tuned)}).
* Backbone: {backbone["name"]} ({_identity(backbone)}); any other is refused.
* Recipe `{recipe["name"]}`, seed {recipe["seed"]}, data `{recipe["data"]}`; every field is in
  `compressor_config.json`.
* Trained with {versions}{_commit()}.
"""


def _storage(config: Mapping[str, Any], tuned: int) -> str:
    storage = config.get("storage")
    if tuned and storage in LARGEST:
        bits = storage.removeprefix("delta")
        return f"matrices as {bits}-bit differences to the backbone, the rest in half precision"
    return "half precision"


def _identity(backbone: Mapping[str, Any]) -> str:
    if "hub" in backbone:
        return f"{backbone['hub']}, revision {backbone.get('revision')}"
    return f"weights {backbone.get('weights')}"


def _commit() -> str:
    tree = checkout()
    if tree is None:
        return ""
    return f", commit {tree['commit']}{' with changes' if tree['dirty'] else ''}"
