"""FSDP and DeepSpeed: what they may divide, and divided weights outside their own forward pass."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils import DistributedType, is_deepspeed_available
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy

from etcbench.console import notice
from etcbench.errors import UsageError

FSDP, DEEPSPEED = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"
LOADED_ONCE = "FSDP_CPU_RAM_EFFICIENT_LOADING"
CONFIG = "accelerate's config"


def wants(*kinds: str) -> bool:
    """Whether accelerate was asked for one of these, by the names of its variables."""
    return any(os.environ.get(kind, "").lower() == "true" for kind in kinds)


def check_launch(cpu: bool, main: bool) -> None:
    """Look at what accelerate was asked for before anything is loaded.

    Parameters
    ----------
    cpu : bool
        Whether there is no accelerator.
    main : bool
        Whether this process speaks to the user.

    Raises
    ------
    UsageError
        If DeepSpeed is asked for and not installed, or only one process would load the model.
    """
    if wants(DEEPSPEED) and not is_deepspeed_available():
        raise UsageError(f"{CONFIG} asks for DeepSpeed, which is missing: pip install deepspeed")
    if wants(FSDP) and wants(LOADED_ONCE):
        raise UsageError(
            "a method sets its start by the whole model on every process; in "
            f"{CONFIG}, set fsdp_cpu_ram_efficient_loading: false"
        )
    if cpu and main and wants(FSDP, DEEPSPEED):
        notice("accelerate divides no model among CPUs: the processes train with DDP")


def check_division(state: Any, unit: str) -> None:
    """Refuse a way to divide the model with which the training would fail or go wrong.

    Parameters
    ----------
    state : accelerate.state.AcceleratorState
        How accelerate divides the model.
    unit : str
        Class of the decoder layers. Only they may be units of their own: methods read other parts
        of the model, which all belong to the root, outside the forward pass of these parts.

    Raises
    ------
    UsageError
        Says which setting of accelerate's config has to change.
    """
    if state.distributed_type == DistributedType.FSDP:
        plugin = state.fsdp_plugin
        others = set(plugin.transformer_cls_names_to_wrap or ()) - {unit}
        if others or plugin.auto_wrap_policy is size_based_auto_wrap_policy:
            raise UsageError(
                f"FSDP can divide this model by {unit} alone; in {CONFIG}, set "
                "fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP and "
                f"fsdp_transformer_layer_cls_to_wrap: {unit}"
            )
        if plugin.fsdp_version == 1 and not plugin.use_orig_params:
            raise UsageError(
                "FSDP 1 makes one parameter of what is trained and what is not; in "
                f"{CONFIG}, set fsdp_use_orig_params: true, or fsdp_version: 2"
            )
    if state.distributed_type == DistributedType.DEEPSPEED:
        zero = state.deepspeed_plugin.deepspeed_config.get("zero_optimization", {})
        if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
            raise UsageError(
                "DeepSpeed ZeRO-3 would not give the trained weights back; in "
                f"{CONFIG}, set zero3_save_16bit_model: true"
            )


def is_unit(module: nn.Module) -> bool:
    """Whether FSDP holds the whole weights of a module only while its forward pass runs."""
    return isinstance(module, FSDPModule | FullyShardedDataParallel)


def undivided(module: nn.Module) -> Iterator[nn.Module]:
    """Go through a module and its parts, but for units of FSDP and theirs."""
    if not is_unit(module):
        yield module
        for part in module.children():
            yield from undivided(part)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Hold the whole weights of a module on every process; nothing where they are not divided.

    Parameters
    ----------
    module : nn.Module
        A unit of FSDP (1 or 2), or any module under DeepSpeed.
    """
    if isinstance(module, FSDPModule):
        module.unshard()
        try:
            yield
        finally:
            module.reshard()
    elif isinstance(module, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(module, writeback=False):
            yield
    elif any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(module.parameters())):
            yield
    else:
        yield
