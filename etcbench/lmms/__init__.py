"""lmms-eval in both directions: etcbench as one of its models, its benchmarks in our engine.

Needs the extra ``lmms``; nothing here is imported unless it is asked for. ``model`` holds the two
model classes that ``lmms-eval --model etcbench`` finds through the entry point below, ``task`` the
adapter behind ``--task lmms:<name>``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

# lmms-eval picks prompt variants by this name, so it must be no built-in model's.
MODEL_NAME = "etcbench"


def manifest() -> ModelManifest:
    """Describe the model to lmms-eval (entry-point group ``lmms_eval.models``, spec tasks 6.1)."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id=MODEL_NAME,
        simple_class_path="etcbench.lmms.model.EtcbenchSimple",
        chat_class_path="etcbench.lmms.model.EtcbenchChat",
    )
