"""etcbench: benchmark visual-token compression in vision-language models.

The public interface is imported on first use, so that ``import etcbench`` stays immediate::

    model = etcbench.load_model("llava-hf/llava-1.5-7b-hf")
    method = etcbench.load_compressor("fastv", 192, model)
    run = etcbench.evaluate(model, method, etcbench.load_task("mme", data="hub"))
    print(run.summary["headline"], run.summary["interval"])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from etcbench.backbones import load_backbone as load_model
    from etcbench.efficiency.measure import measure
    from etcbench.loading import load_task
    from etcbench.report import compare
    from etcbench.run import evaluate, load_compressor

__all__ = ["compare", "evaluate", "load_compressor", "load_model", "load_task", "measure"]

_HOMES = {
    "compare": ("etcbench.report", "compare"),
    "evaluate": ("etcbench.run", "evaluate"),
    "load_compressor": ("etcbench.run", "load_compressor"),
    "load_model": ("etcbench.backbones", "load_backbone"),
    "load_task": ("etcbench.loading", "load_task"),
    "measure": ("etcbench.efficiency.measure", "measure"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'etcbench' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
