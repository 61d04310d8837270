"""Weights of a module that FSDP or DeepSpeed has divided, for use outside its own forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel


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
