"""Vision-language models behind one interface, one file per family.

A family is a module in this package that defines ``BACKBONE`` (a `Backbone` subclass) for one
``model_type`` of transformers; adding a family is adding such a file.
"""

from etcbench.backbones.base import Backbone, Pixels, Prompt
from etcbench.backbones.loading import load_backbone

__all__ = ["Backbone", "Pixels", "Prompt", "load_backbone"]
