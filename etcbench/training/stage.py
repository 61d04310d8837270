"""One optimisation run of a recipe, and which parts of the model it trains."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

from etcbench.errors import UsageError

if TYPE_CHECKING:
    from etcbench.training.model import CompressionModel

Part = Literal["vision tower", "projector", "language model", "token embeddings", "adapter",
               "method", "auxiliary"]  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """One optimisation run of a recipe.

    Attributes
    ----------
    steps : int or None
        Optimiser steps; None where `epochs` says it.
    epochs : float or None
        Passes over the data, instead of `steps`.
    batch_size : int
        Samples per step, over all processes and accumulated passes.
    micro_batch_size : int or None
        Most samples of one forward pass on one device; a step accumulates the gradients of as
        many passes as it takes. None: the device's whole share of the batch.
    warmup_steps : int
        Steps of linear warm-up.
    warmup_ratio : float or None
        The same as a share of all steps; overrides `warmup_steps`.
    learning_rate : float
        Peak rate of the language model, projector and method.
    final_rate : float
        Share of the peak rate at which the cosine schedule ends.
    vision_learning_rate : float
        Peak rate of the vision tower; 0 freezes it.
    auxiliary_learning_rate : float or None
        Peak rate of training-only modules; None: `learning_rate`.
    weight_decay, max_grad_norm : float
        Of AdamW; norm to which gradients are clipped, 0 for no clipping.
    betas : tuple of float
        Of AdamW.
    tune_model : bool
        Whether the language model (or the adapter on it) and the projector are trained; else only
        the method's parameters.
    tune_projector : bool or None
        Whether the projector is trained; None: as `tune_model`. Qwen3-VL's patch mergers are its
        projector.
    tune_tokens : bool
        Whether token embeddings and head are trained with the language model.
    freeze : tuple of str
        Patterns of parameter names that stay as they are, e.g. ``compressor.qformer.*``.
    data : str or None
        Data of this stage; None: the recipe's.
    images : str or None
        Folder of this stage's pictures; None: the recipe's.
    captions : bool
        Whether samples are read as a picture and its caption alone, as in LLaVA's first stage; a
        method that reads the question still gets it.
    max_length : int or None
        Tokens at which a conversation is cut; None: the recipe's.
    group_by_modality : bool
        Whether a batch of conversations holds either pictures or text only, and similar lengths.
    mix : dict or None
        Weights of the kinds of turn; None for the data's own.
    turns : int or None
        Turns per picture; None for the recipe's. With 0 pictures are only named (`grounding`) and
        the decoder never runs: a warm-up of the vision tower and the word embeddings.
    grounding : float
        Weight of naming, by the model's own word embeddings, what each visual embedding shows;
        needs data that says so. It puts pictures and words into one space (LLaVA's first stage
        does it with captions), without which "is there a ..." is learned word by word.
    phase : str or None
        Which of the method's objectives is trained, if it has several; None for its first.
    precompute : int
        Samples from which a method that is not trained on pictures and turns notes its examples,
        once; `steps` and `epochs` then count batches and passes of those. 0: no such method.
    save_steps, log_steps : int
        Steps between checkpoints from which a stopped run continues; between log records.
    """

    steps: int | None = None
    batch_size: int = 32
    warmup_steps: int = 50
    learning_rate: float = 1e-3
    vision_learning_rate: float = 0.0
    tune_model: bool = True
    mix: dict[str, float] | None = None
    turns: int | None = None
    auxiliary_learning_rate: float | None = 1e-3
    grounding: float = 0.0
    final_rate: float = 0.02
    save_steps: int = 200
    log_steps: int = 20
    epochs: float | None = None
    micro_batch_size: int | None = None
    warmup_ratio: float | None = None
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    tune_projector: bool | None = None
    tune_tokens: bool = False
    freeze: tuple[str, ...] = ()
    data: str | None = None
    images: str | None = None
    captions: bool = False
    max_length: int | None = None
    group_by_modality: bool = True
    phase: str | None = None
    precompute: int = 0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise UsageError("a stage says how long it trains: either steps or epochs")
        whole = ("steps", "batch_size", "micro_batch_size", "max_length", "save_steps", "log_steps")
        for name in whole:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"a stage's {name} is at least 1, not {value}")
        if self.epochs is not None and self.epochs <= 0:
            raise UsageError(f"a stage's epochs is more than 0, not {self.epochs}")
        for name in ("learning_rate", "auxiliary_learning_rate", "vision_learning_rate",
                     "weight_decay", "max_grad_norm", "warmup_steps", "precompute"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UsageError(f"a stage's {name} cannot be negative ({value})")
        for name in ("warmup_ratio", "final_rate"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UsageError(f"a stage's {name} is a share from 0 to 1, not {value}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UsageError(f"a stage's betas are two numbers from 0 to below 1, not {self.betas}")

    def length(self, samples: int | None) -> int:
        """Count the optimiser steps on data of so many samples (None: endless).

        Raises
        ------
        UsageError
            If the stage counts epochs and the data has no end.
        """
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        if samples is None:
            raise UsageError("the data has no end, so a stage on it needs steps, not epochs")
        return max(1, math.ceil(self.epochs * samples / self.batch_size))

    def warmup(self, steps: int) -> int:
        """Count the steps of warm-up of ``steps``."""
        if self.warmup_ratio is None:
            return self.warmup_steps
        return math.ceil(self.warmup_ratio * steps)

    def split(self, processes: int) -> tuple[int, int]:
        """Divide a step's samples.

        Parameters
        ----------
        processes : int
            Processes that share a step.

        Returns
        -------
        tuple of int
            Samples of one forward pass, and passes of each process per step.

        Raises
        ------
        UsageError
            If the batch does not divide.
        """
        share, rest = divmod(self.batch_size, processes)
        if rest or not share:
            raise UsageError(
                f"a batch of {self.batch_size} samples does not divide among {processes} "
                "processes; change batch_size"
            )
        micro = min(self.micro_batch_size or share, share)
        if share % micro:
            raise UsageError(
                f"the {share} samples of each process do not divide into passes of {micro}; "
                "change micro_batch_size"
            )
        return micro, share // micro


def part_of(name: str) -> Part:
    """Name the part of the model that a parameter of `CompressionModel` belongs to."""
    name = name.replace("_fsdp_wrapped_module.", "")
    if name.startswith("auxiliary."):
        return "auxiliary"
    if name.startswith("compressor."):
        return "method"
    if "lora_" in name:
        return "adapter"
    if "multi_modal_projector." in name or ".visual.merger." in name:
        return "projector"
    if ".visual.deepstack_merger_list." in name:
        return "projector"
    if "vision_tower." in name or ".visual." in name:
        return "vision tower"
    if "embed_tokens" in name or "lm_head" in name:
        return "token embeddings"
    return "language model"


def choose_trainable(model: CompressionModel, stage: Stage, tokens_too: bool) -> None:
    """Freeze what a stage does not train.

    Parameters
    ----------
    tokens_too : bool
        Whether the token embeddings (and a tied head) are trained although the stage does not ask
        for it; a compressor leaves them be, so that its checkpoint stays small.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in stage.freeze:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UsageError(f"freeze: no parameter is named {pattern}")
    projector = stage.tune_model if stage.tune_projector is None else stage.tune_projector
    adapted = any(part_of(name) == "adapter" for name in names)
    wanted: dict[Part, bool] = {
        "vision tower": stage.vision_learning_rate > 0,
        "projector": projector,
        "language model": stage.tune_model and not adapted,
        "token embeddings": stage.tune_model and (tokens_too or stage.tune_tokens),
        "adapter": stage.tune_model,
        "method": True,
        "auxiliary": True,
    }
    for name, parameter in model.named_parameters():
        frozen = any(fnmatchcase(name, pattern) for pattern in stage.freeze)
        parameter.requires_grad_(wanted[part_of(name)] and not frozen)
