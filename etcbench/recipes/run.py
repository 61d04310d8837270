"""Run or continue the stages of a recipe, and write what it trained."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from etcbench.adapters import add_adapter, is_adapter, save_adapter
from etcbench.backbones import Backbone, load_backbone
from etcbench.console import notice
from etcbench.deltas import HALF
from etcbench.errors import UsageError
from etcbench.packing import Packer
from etcbench.recipes.recipe import Recipe, check_trained, method_of
from etcbench.recipes.sources import MICRO, data_of, open_source
from etcbench.training import CompressionModel, Indexed, choose_trainable, train_stage
from etcbench.training.sharding import DEEPSPEED, FSDP, check_launch, wants
from etcbench.training.targets import computed, stack


def train(recipe: Recipe, output: Path) -> Path:
    """Run a recipe; the same call again continues it.

    Under ``accelerate launch`` every process calls this; together they train as one would.

    Parameters
    ----------
    recipe : Recipe
        What to train.
    output : Path
        Receives one directory per stage (checkpoints, ``log.jsonl``) and the result.

    Returns
    -------
    Path
        ``output/result``: a model directory, or a compressor checkpoint.

    Raises
    ------
    UsageError
        If the method is not trained (`check_trained`), ``output`` holds a run of another recipe
        (names what differs), or accelerate's config asks for what is not there or does not work.
    """
    check_trained(recipe)
    cpu = not torch.cuda.is_available()
    check_launch(cpu, main=os.environ.get("RANK", "0") == "0")
    processes = PartialState(cpu=cpu)
    with processes.main_process_first():
        _state(recipe, output, write=processes.is_main_process)
    model = start(recipe, output)
    begin: dict[str, int] = {}
    for number in range(len(recipe.stages)):
        if number and wants(FSDP, DEEPSPEED):
            # They divide a model for good, so a next stage starts from a new one, which is loaded
            # whole: transformers divides by itself what it loads while a ZeRO-3 config is set.
            unset_hf_deepspeed_config()
            model = start(recipe, output)
            model.load_state_dict(trained_by(recipe, output, number), strict=False)
        _run_stage(recipe, model, number, begin, output)
    if processes.is_main_process:
        _export(recipe, model, trained_by(recipe, output), output / "result")
    processes.wait_for_everyone()
    return output / "result"


def start(recipe: Recipe, output: Path) -> CompressionModel:
    """Load or build what a recipe trains, on the CPU; Trainer takes it where it belongs."""
    backbone = _scratch(recipe, output) if recipe.from_scratch else _load(recipe)
    if recipe.lora is not None:
        torch.manual_seed(recipe.seed)
        add_adapter(backbone.model, recipe.lora)
    torch.manual_seed(recipe.seed)
    return CompressionModel(backbone, method_of(recipe, backbone.spec))


def trained_by(recipe: Recipe, output: Path, stages: int | None = None) -> dict[str, Tensor]:
    """Collect what the first ``stages`` (all) stages left behind; later ones override."""
    weights: dict[str, Tensor] = {}
    for number in range(len(recipe.stages) if stages is None else stages):
        weights |= load_file(_finished(output, number))
    return weights


def _state(recipe: Recipe, output: Path, write: bool) -> None:
    """Write down what is trained here, or make sure that it is the same."""
    output.mkdir(parents=True, exist_ok=True)
    now = json.loads(json.dumps(asdict(recipe)))
    stated = output / "recipe.json"
    if stated.exists():
        # How weights are stored does not change them: what is trained may be written again.
        old = {**json.loads(stated.read_text()), "storage": recipe.storage}
        if differ := _differing(old, now):
            raise UsageError(
                f"{output} holds a run of another recipe (see {stated}: {differ[0]} differs); "
                "choose another --out"
            )
    elif write:
        stated.write_text(json.dumps(now, indent=1, sort_keys=True))


def _differing(old: Any, new: Any, where: str = "") -> list[str]:
    """Name the fields that differ; one that an older version did not know has its default."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        shared = [key for key in new if key in old]
        return [path for key in shared for path in _differing(old[key], new[key], f"{where}.{key}")]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [path for i, (a, b) in pairs for path in _differing(a, b, f"{where}.{i}")]
    return [] if old == new else [where.lstrip(".")]


def _load(recipe: Recipe) -> Backbone:
    # DeepSpeed keeps full-precision weights of its own; all others train those that are loaded.
    half = recipe.precision == "bf16" and wants(DEEPSPEED)
    return load_backbone(recipe.model, device="cpu", dtype="bfloat16" if half else "float32")


def _scratch(recipe: Recipe, output: Path) -> Backbone:
    from etcbench.backbones.loading import families, resolve_options
    from etcbench.micro.untrained import build

    model, processor = build(recipe.model, recipe.seed, recipe.warmup_steps, output / "warmup")
    family = families()[model.config.model_type]
    return family(
        model=model,
        processor=processor,
        spec=family.spec_of(model.config, recipe.model),
        identity={"name": recipe.model},
        options=resolve_options(family, {}),
    )


def _finished(output: Path, number: int) -> Path:
    return output / f"stage-{number}" / "trained.safetensors"


def _run_stage(
    recipe: Recipe, model: CompressionModel, number: int, begin: dict[str, int], output: Path
) -> None:
    """Train one stage, or take over what it left; ``begin`` counts what was read of each data."""
    stage, name = recipe.stages[number], data_of(recipe, recipe.stages[number])
    finished = _finished(output, number)
    choose_trainable(model, stage, tokens_too=recipe.from_scratch)
    source = open_source(recipe, stage)
    if skipped := getattr(source, "skipped", 0):
        notice(f"stage {number}: {skipped} samples are left out, their pictures do not exist")
    count = stage.precompute or stage.length(getattr(source, "size", None)) * stage.batch_size
    first = begin.get(name, 0)
    begin[name] = first + count
    if finished.exists():
        model.load_state_dict(load_file(finished))
        return
    packer = Packer(
        model.backbone,
        model.method.prompt_layout,
        conversation=name != MICRO,
        separate=model.method.separate_turns,
        captions=stage.captions,
        max_length=stage.max_length or recipe.max_length,
    )
    data: Dataset[Any] = Indexed(source, first, count)
    collator: Any = packer
    if stage.precompute:
        data, collator = computed(model, stage, data, packer, finished.parent, recipe.seed), stack
    trained = train_stage(
        model,
        stage,
        data,
        collator,
        finished.parent,
        recipe.seed,
        precision=recipe.precision,
        checkpointing=recipe.gradient_checkpointing,
        workers=recipe.workers,
    )
    processes = PartialState()
    if processes.is_main_process:
        unfinished = finished.with_suffix(".part")
        save_file(trained, unfinished)
        unfinished.rename(finished)
    processes.wait_for_everyone()


def _export(
    recipe: Recipe, model: CompressionModel, weights: dict[str, Tensor], path: Path
) -> None:
    """Write a model directory (from scratch), or a checkpoint with what differs from the model."""
    backbone = model.backbone
    if recipe.from_scratch:
        from etcbench.micro.untrained import save

        save(backbone.model.eval(), backbone.processor, path)
        return
    from etcbench.checkpoints import save_checkpoint

    kept = {name: value for name, value in weights.items() if not name.startswith("auxiliary.")}
    adapter = {name: value for name, value in kept.items() if is_adapter(name)}
    own = {name: value for name, value in kept.items() if name not in adapter}
    base = None
    if recipe.storage != HALF:  # the model at hand has been trained
        base = {f"model.{key}": value for key, value in _load(recipe).model.named_parameters()}
    save_checkpoint(path, model.method, backbone, own, asdict(recipe), base)
    if recipe.lora is not None:
        names = {name.removeprefix("model."): value for name, value in adapter.items()}
        save_adapter(path, recipe.lora, names)
