"""What a recipe would take: parameters, memory, steps; from configs, on the meta device.

Memory per device, in bytes, with P parameters of which T are trained:

* weights: 4 P (DeepSpeed: 2 P); gradients: 4 T (DeepSpeed: 2 T), twice under DDP, whose buckets
  are as large; AdamW: 8 T (DeepSpeed: 12 T, with its full-precision copy); each divided by the
  devices that share it.
* 16-bit working copies: 2 T, what autocast keeps; where weights are divided, two decoder layers
  and whatever is not in one.
* activations: a decoder layer stores, for each token, 16-bit inputs of its products
  (4 D + 2 (H + H_kv) d_h + 4 I numbers) and two fp32 norms (8 D bytes). With gradient checkpointing
  2 D bytes for each layer, and one layer in full. Attention matrices are never stored.
* logits: 10 V bytes for each text token (16 bit, fp32, and its gradient).

A pass is planned at its longest: every sample at ``max_length``, every text token trained.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from etcbench.adapters import add_adapter
from etcbench.backbones.base import Backbone
from etcbench.backbones.loading import MICRO_MODELS, micro_models, resolve_options
from etcbench.compressor import ModelSpec
from etcbench.efficiency.shapes import Shape
from etcbench.packing import Packer
from etcbench.recipes.launch import Launch, read_launch
from etcbench.recipes.recipe import Recipe, method_of
from etcbench.recipes.sources import MICRO, data_of, open_source, samples_of
from etcbench.training import CompressionModel, Stage, choose_trainable
from etcbench.training.stage import part_of

GIB = 2**30
PROBED = 16  # samples that are packed to see how long they are


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    weights: float
    gradients: float
    optimizer: float
    working_copies: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class StagePlan:
    """What one stage takes.

    Attributes
    ----------
    trained : dict of str to int
        Trained parameters of each part of the model.
    steps, samples, batch_size : int
        Optimiser steps, samples altogether, samples of a step.
    micro_batch_size, passes : int
        Samples of a forward pass on one device; passes of a step.
    tokens : int
        Tokens of the language model's input in one step.
    measured : bool
        Whether ``tokens`` was measured on the data; else it is the most there can be.
    memory : Memory
        Of one device.
    """

    trained: dict[str, int]
    steps: int
    samples: int
    batch_size: int
    micro_batch_size: int
    passes: int
    tokens: int
    measured: bool
    memory: Memory


@dataclass(frozen=True)
class Plan:
    """What a recipe takes on the devices of a launch."""

    recipe: Recipe
    launch: Launch
    parameters: dict[str, int]
    stages: tuple[StagePlan, ...]


def plan(recipe: Recipe, accelerate_config: Path | None = None) -> Plan:
    """Work out what a recipe takes, without weights, data or a device.

    Raises
    ------
    UsageError
        If the model's config or the number of samples is not known, or a batch does not divide.
    """
    launch = read_launch(accelerate_config)
    model = _on_meta(recipe)
    stages = tuple(_plan_stage(recipe, stage, model, launch) for stage in recipe.stages)
    return Plan(recipe, launch, _count(model, trained=False), stages)


def _on_meta(recipe: Recipe) -> CompressionModel:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    shape = Shape.named(recipe.model)
    folder = MICRO_MODELS / recipe.model if recipe.model in micro_models() else Path(recipe.model)
    processor = AutoProcessor.from_pretrained(folder) if folder.is_dir() else None
    with torch.device("meta"):
        backbone: Backbone = shape.family(
            model=AutoModelForImageTextToText.from_config(shape.config),
            processor=processor,
            spec=shape.spec,
            identity={},
            options=resolve_options(shape.family, {}),
        )
        if recipe.lora is not None:
            add_adapter(backbone.model, recipe.lora)
        return CompressionModel(backbone, method_of(recipe, backbone.spec))


def _count(model: CompressionModel, trained: bool) -> dict[str, int]:
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or not trained:
            parts[part_of(name)] = parts.get(part_of(name), 0) + parameter.numel()
    return parts


def _plan_stage(recipe: Recipe, stage: Stage, model: CompressionModel, launch: Launch) -> StagePlan:
    choose_trainable(model, stage, tokens_too=recipe.from_scratch)
    steps = stage.length(stage.precompute or samples_of(recipe, stage))
    micro, passes = stage.split(launch.processes)
    probed = _probe(recipe, stage, model)
    length = stage.max_length or recipe.max_length
    longest, mean = probed or (length, float(length))
    return StagePlan(
        trained=_count(model, trained=True),
        steps=steps,
        samples=steps * stage.batch_size,
        batch_size=stage.batch_size,
        micro_batch_size=micro,
        passes=passes,
        tokens=round(stage.batch_size * mean),
        measured=probed is not None,
        memory=_memory(recipe, model, launch, micro * longest),
    )


def _probe(recipe: Recipe, stage: Stage, model: CompressionModel) -> tuple[int, float] | None:
    """Longest and mean length of the first few samples, if data and tokenizer are here."""
    name = data_of(recipe, stage)
    if model.backbone.processor is None or not (name == MICRO or Path(name).is_file()):
        return None
    source = open_source(recipe, stage)
    packer = Packer(
        model.backbone,
        model.method.prompt_layout,
        conversation=name != MICRO,
        separate=model.method.separate_turns,
        captions=stage.captions,
        max_length=stage.max_length or recipe.max_length,
    )
    counts = [packer([source.sample(number)])["batch"].tokens for number in range(PROBED)]
    return max(counts), sum(counts) / len(counts)


def _memory(recipe: Recipe, model: CompressionModel, launch: Launch, tokens: int) -> Memory:
    everything = sum(_count(model, trained=False).values())
    trained = sum(_count(model, trained=True).values())
    half = launch.deepspeed and recipe.precision == "bf16"
    layer = sum(parameter.numel() for parameter in model.backbone.decoder_layers[0].parameters())
    ddp = launch.processes > 1 and not launch.gradients and not launch.deepspeed
    text = model.backbone.model.config.text_config
    width = 4 if recipe.precision == "fp32" else 2
    copies = 0.0 if recipe.precision == "fp32" or half else 2.0 * trained
    if launch.weights:
        root = everything - layer * len(model.backbone.decoder_layers)
        copies = width * (2.0 * layer + root)
    states = {
        "weights": launch.per_device(launch.weights, (2 if half else 4) * everything),
        "gradients": launch.per_device(launch.gradients, (2 if half else 4) * trained * (1 + ddp)),
        "optimizer": launch.per_device(launch.optimizer, (12 if half else 8) * trained),
    }
    held = {part: 0.0 if part in launch.offloaded else size for part, size in states.items()}
    if getattr(model.auxiliary, "second_pass", None) == "initial":  # whole on every device
        teacher = sum(parameter.numel() for parameter in model.model.parameters())
        held["weights"] += (2 if half else 4) * teacher
    return Memory(
        **held,
        working_copies=copies,
        activations=_activations(model.backbone.spec, recipe, tokens, width),
        logits=float(tokens * text.vocab_size * (width + 8)),
    )


def _activations(spec: ModelSpec, recipe: Recipe, tokens: int, width: int) -> float:
    """Estimate what the decoder stores for the backward pass."""
    heads = 2 * (spec.heads + spec.kv_heads) * spec.head_dim
    layer = width * (4 * spec.hidden + heads + 4 * spec.mlp) + 8 * spec.hidden
    if recipe.gradient_checkpointing:
        return float(tokens * (spec.layers * width * spec.hidden + layer))
    return float(tokens * spec.layers * layer)


def show_plan(found: Plan, as_json: bool) -> None:
    """Print a plan."""
    if as_json:
        print(json.dumps(asdict(found), indent=1))
        return
    from etcbench.console import show

    recipe, stages = found.recipe, found.stages
    numbers = [f"stage {number}" for number in range(len(stages))]
    trained = [sum(stage.trained.values()) for stage in stages]
    rows = [
        [part, f"{count:,}", *(f"{stage.trained.get(part, 0):,}" for stage in stages)]
        for part, count in found.parameters.items()
    ]
    total = [f"{sum(found.parameters.values()):,}", *(f"{count:,}" for count in trained)]
    how = ", gradient checkpointing" if recipe.gradient_checkpointing else ""
    columns = ["parameters", recipe.model, *(f"trained in {number}" for number in numbers)]
    notes = [f"{recipe.name}: {recipe.method}, {found.launch.name}, {recipe.precision}{how}"]
    show(columns, [*rows, ["all", *total]], notes)
    print()
    parts = asdict(stages[0].memory)
    memory = [
        [part.replace("_", " "), *(f"{asdict(s.memory)[part] / GIB:.2f}" for s in stages)]
        for part in parts
    ]
    memory.append(["all", *(f"{stage.memory.total / GIB:.2f}" for stage in stages)])
    aside = [f"in the host's memory: {', '.join(found.launch.offloaded)}"]
    show(
        ["GiB per device", *numbers],
        memory,
        ["Activations and logits are an estimate for the longest pass; docs/training.md has the "
         "formula.", *(aside if found.launch.offloaded else [])],
    )  # fmt: skip
    print()
    show(
        ["training", *numbers],
        [
            ["steps", *(f"{stage.steps:,}" for stage in stages)],
            ["samples per step", *(f"{stage.batch_size:,}" for stage in stages)],
            [
                "of these per device and pass",
                *(f"{stage.micro_batch_size} x {stage.passes} passes" for stage in stages),
            ],
            ["samples", *(f"{stage.samples:,}" for stage in stages)],
            [
                "tokens per step",
                *(f"{'' if stage.measured else 'at most '}{stage.tokens:,}" for stage in stages),
            ],
        ],
    )
