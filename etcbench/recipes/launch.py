"""How accelerate spreads a training over devices, read from its config file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from etcbench.errors import UsageError


@dataclass(frozen=True)
class Launch:
    """What decides over memory and the division of a step.

    Attributes
    ----------
    name : str
        For people.
    processes : int
        Devices, all machines together.
    group : int
        Devices among which states are divided.
    weights, gradients, optimizer : bool
        What is divided among them.
    offloaded : tuple of str
        Which of these lie in the host's memory instead.
    deepspeed : bool
        DeepSpeed loads 16-bit weights and keeps full-precision copies with the optimizer.
    """

    name: str = "one device"
    processes: int = 1
    group: int = 1
    weights: bool = False
    gradients: bool = False
    optimizer: bool = False
    offloaded: tuple[str, ...] = ()
    deepspeed: bool = False

    def per_device(self, divided: bool, amount: float) -> float:
        """Share of an amount that one device holds."""
        return amount / self.group if divided else amount


def read_launch(file: Path | None) -> Launch:
    """Read a file of ``accelerate config``; None is one device.

    Raises
    ------
    UsageError
        If the file does not exist or is of another kind.
    """
    if file is None:
        return Launch()
    if not file.is_file():
        raise UsageError(f"--accelerate-config {file} does not exist; accelerate config writes one")
    try:
        raw = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise UsageError(f"--accelerate-config {file} is not YAML: {error}") from error
    if not isinstance(raw, dict) or "distributed_type" not in raw:
        raise UsageError(f"--accelerate-config {file} has no distributed_type")
    processes, machines = int(raw.get("num_processes", 1)), int(raw.get("num_machines", 1))
    kind = str(raw["distributed_type"]).upper()
    if kind == "FSDP":
        return _fsdp(raw.get("fsdp_config") or {}, processes, machines)
    if kind == "DEEPSPEED":
        return _deepspeed(raw.get("deepspeed_config") or {}, processes)
    if processes == 1:
        return Launch()
    return Launch(f"DDP on {processes} devices", processes, processes)


def _fsdp(config: dict[str, Any], processes: int, machines: int) -> Launch:
    strategy = str(config.get("fsdp_sharding_strategy", "FULL_SHARD"))
    reshard = str(config.get("fsdp_reshard_after_forward", "true"))
    if reshard.isupper():  # version 1 names the strategy here, too
        strategy = reshard
    elif int(config.get("fsdp_version", 1)) == 2:
        strategy = "FULL_SHARD" if reshard.lower() == "true" else "SHARD_GRAD_OP"
    strategy = {"1": "FULL_SHARD", "2": "SHARD_GRAD_OP", "3": "NO_SHARD", "4": "HYBRID_SHARD"}.get(
        strategy, strategy
    )
    hybrid = strategy.startswith("HYBRID")
    offload = str(config.get("fsdp_offload_params", "false")).lower() == "true"
    return Launch(
        f"FSDP {strategy} on {processes} devices",
        processes,
        processes // machines if hybrid else processes,
        weights=strategy in ("FULL_SHARD", "HYBRID_SHARD"),
        gradients=strategy != "NO_SHARD",
        optimizer=strategy != "NO_SHARD",
        offloaded=("weights", "gradients", "optimizer") if offload else (),
    )


def _deepspeed(config: dict[str, Any], processes: int) -> Launch:
    stage = config.get("zero_stage")
    if stage is None and (inner := config.get("deepspeed_config_file")):
        stage = (yaml.safe_load(Path(inner).read_text()).get("zero_optimization") or {}).get(
            "stage"
        )
    zero = int(stage or 0)
    offloaded = tuple(
        part
        for part, key in (
            ("optimizer", "offload_optimizer_device"),
            ("weights", "offload_param_device"),
        )
        if str(config.get(key, "none")) != "none"
    )
    return Launch(
        f"DeepSpeed ZeRO-{zero} on {processes} devices",
        processes,
        processes,
        weights=zero >= 3,
        gradients=zero >= 2,
        optimizer=zero >= 1,
        offloaded=offloaded,
        deepspeed=True,
    )
