"""One optimisation run of a recipe, and which parts of the model it trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from etcbench.training.model import CompressionModel


@dataclass(frozen=True)
class Stage:
    """One optimisation run of a recipe.

    Attributes
    ----------
    steps, batch_size, warmup_steps : int
        Optimiser steps, samples per step, steps of linear warm-up.
    learning_rate : float
        Peak rate of the language model, projector and method.
    final_rate : float
        Share of the peak rate at which the cosine schedule ends.
    vision_learning_rate : float
        Peak rate of the vision tower; 0 freezes it.
    tune_model : bool
        Whether the language model and projector are trained (else the method's parameters only).
    mix : dict or None
        Weights of the kinds of turn; None for the data's own.
    turns : int or None
        Turns per picture; None for the recipe's. With 0 pictures are only named (`grounding`) and
        the decoder never runs: a warm-up of the vision tower and the word embeddings.
    auxiliary_learning_rate : float
        Peak rate of training-only modules.
    grounding : float
        Weight of naming, by the model's own word embeddings, what each visual embedding shows;
        needs data that says so. It puts pictures and words into one space (LLaVA's first stage
        does it with captions), without which "is there a ..." is learned word by word.
    save_steps : int
        Steps between checkpoints from which a stopped run continues.
    """

    steps: int
    batch_size: int = 32
    warmup_steps: int = 50
    learning_rate: float = 1e-3
    vision_learning_rate: float = 0.0
    tune_model: bool = True
    mix: dict[str, float] | None = None
    turns: int | None = None
    auxiliary_learning_rate: float = 1e-3
    grounding: float = 0.0
    final_rate: float = 0.02
    save_steps: int = 200


def in_tower(name: str) -> bool:
    """Whether a parameter belongs to a vision tower (CLIP's or Qwen's)."""
    return "vision_tower." in name or ".visual." in name


def choose_trainable(model: CompressionModel, stage: Stage, tokens_too: bool) -> None:
    """Freeze what a stage does not train.

    Parameters
    ----------
    tokens_too : bool
        Whether the token embeddings (and a tied head) are trained; a compressor leaves them be,
        so that its checkpoint stays small.
    """
    for name, parameter in model.named_parameters():
        if in_tower(name):
            wanted = stage.vision_learning_rate > 0
        elif name.startswith("model."):
            is_token = "embed_tokens" in name or "lm_head" in name
            wanted = stage.tune_model and (tokens_too or not is_token)
        else:
            wanted = True
        parameter.requires_grad_(wanted)
