"""Build methods for a measurement, which needs no trained weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from etcbench.backbones import Backbone
from etcbench.budget import Budget, ModelSpec
from etcbench.compressor import Compressor
from etcbench.errors import MissingCheckpointError
from etcbench.presets import method_class, resolved
from etcbench.run import LoadedMethod, load_compressor


def build(
    name: str,
    tokens: str | None,
    backbone: Backbone,
    options: Mapping[str, Any] | None = None,
    checkpoint: str | None = None,
) -> LoadedMethod:
    """Build a method for a loaded model: with its weights where there are any, else random ones.

    Only drafts depend on them, because a draft may be right or wrong.

    Raises
    ------
    UsageError
        If there is no such method, budget, option or checkpoint.
    """
    chosen = dict(options or {})
    try:
        return load_compressor(name, tokens, backbone, checkpoint=checkpoint, **chosen)
    except MissingCheckpointError:
        if checkpoint is not None:
            raise
        return load_compressor(name, tokens, backbone, untrained=True, **chosen)


def sized(
    name: str, tokens: str | None, spec: ModelSpec, options: Mapping[str, Any] | None = None
) -> Compressor:
    """Build a method for a model of which only the sizes are known.

    Raises
    ------
    UsageError
        If there is no such method, budget or option.
    """
    kind: type[Compressor] = method_class(name)
    budget = None if tokens is None else Budget.parse(tokens)
    _, budget, chosen = resolved(name, budget, spec, options or {})
    return kind.from_budget(budget, spec, **chosen)
