"""Read a recipe, run or continue its stages, and write what it trained."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from etcbench import registry
from etcbench.backbones import Backbone, load_backbone
from etcbench.compressor import Budget, Compressor
from etcbench.errors import UsageError, unknown_name
from etcbench.packing import Packer
from etcbench.training import CompressionModel, Indexed, Stage, choose_trainable, train_stage

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a training run.

    Attributes
    ----------
    name : str
        For the output directory and the model card.
    method : str
        Compressor to train; ``"full"`` trains the model itself.
    model : str
        Backbone to start from, or to build where ``from_scratch``.
    data : str
        ``"micro"``: the embedded stream of scenes.
    stages : tuple of Stage
        Run one after the other on consecutive samples.
    tokens : int or None
        Budget.
    options : dict
        Options of the method.
    seed : int
        Seed of weights and data.
    turns : int
        Question-answer turns per picture.
    from_scratch : bool
        Build the embedded model with random weights instead of loading it.
    warmup_steps : int
        Steps of the vision warm-up that precedes the stages of a micro-llava from scratch.
    shapes : tuple of tuple of int
        Shapes of the pictures, (rows, columns) of cells, which take turns; empty for the data's
        own single shape.
    """

    name: str
    method: str
    model: str
    data: str
    stages: tuple[Stage, ...]
    tokens: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    turns: int = 8
    from_scratch: bool = False
    warmup_steps: int = 0
    shapes: tuple[tuple[int, int], ...] = ()


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_recipe(name: str, **changes: Any) -> Recipe:
    """Read a recipe by name or from a YAML file, and change fields of it.

    Raises
    ------
    UsageError
        If there is no such recipe, or a field is missing or unknown.
    """
    path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        raise unknown_name("recipe", name, recipe_names())
    raw = yaml.safe_load(path.read_text())
    if not isinstance(raw, dict):
        raise UsageError(f"recipe {path} is not a mapping of fields")
    try:
        stages = tuple(Stage(**stage) for stage in raw.pop("stages"))
        shapes = tuple((rows, columns) for rows, columns in raw.pop("shapes", ()))
        recipe = Recipe(name=path.stem, stages=stages, shapes=shapes, **raw)
    except (TypeError, KeyError, ValueError) as error:
        known = ", ".join(f.name for f in fields(Recipe))
        raise UsageError(f"recipe {path}: {error}; a recipe has {known}") from error
    return replace(recipe, **{k: v for k, v in changes.items() if v is not None})


def train(recipe: Recipe, output: Path) -> Path:
    """Run a recipe; the same call again continues it.

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
    """
    output.mkdir(parents=True, exist_ok=True)
    record = json.dumps(asdict(recipe), indent=1, sort_keys=True)
    stated = output / "recipe.json"
    if stated.exists() and stated.read_text() != record:
        raise UsageError(
            f"{output} holds a run of another recipe (see {stated}); choose another --out"
        )
    stated.write_text(record)
    backbone = _start(recipe, output)
    torch.manual_seed(recipe.seed)
    budget = None if recipe.tokens is None else Budget(recipe.tokens)
    kind = registry.load("baselines", recipe.method)
    compressor = kind.from_budget(budget, backbone.spec, **recipe.options)
    model = CompressionModel(backbone, compressor)
    packer = Packer(backbone, compressor.prompt_layout)
    begin = 0
    for number, stage in enumerate(recipe.stages):
        _run_stage(recipe, model, number, begin, packer, output)
        begin += stage.steps * stage.batch_size
    return _export(recipe, backbone, compressor, model, output / "result")


def _start(recipe: Recipe, output: Path) -> Backbone:
    if not recipe.from_scratch:
        return load_backbone(recipe.model)
    from etcbench.backbones.loading import families, resolve_options
    from etcbench.micro.untrained import build

    model, processor = build(recipe.model, recipe.seed, recipe.warmup_steps, output / "warmup")
    family = families()[model.config.model_type]
    return family(
        model=model.to("cuda" if torch.cuda.is_available() else "cpu"),
        processor=processor,
        spec=family.spec_of(model.config, recipe.model),
        identity={"name": recipe.model},
        options=resolve_options(family, {}),
    )


def _run_stage(
    recipe: Recipe, model: CompressionModel, number: int, begin: int, packer: Packer, output: Path
) -> None:
    stage = recipe.stages[number]
    folder = output / f"stage-{number}"
    finished = folder / "trained.safetensors"
    choose_trainable(model, stage, tokens_too=recipe.from_scratch)
    if finished.exists():
        model.load_state_dict(load_file(finished))
        return
    data = Indexed(_stream(recipe, stage), begin, stage.steps * stage.batch_size)
    train_stage(model, stage, data, packer, folder, recipe.seed)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, finished)


def _stream(recipe: Recipe, stage: Stage) -> Any:
    if recipe.data != "micro":
        raise UsageError(f"recipe {recipe.name}: data {recipe.data!r}; the known source is 'micro'")
    from etcbench.micro.stream import BLIND_SHARE, TurnStream

    turns = recipe.turns if stage.turns is None else stage.turns
    return TurnStream(
        seed=recipe.seed,
        turns=turns,
        mix=stage.mix,
        blind_share=BLIND_SHARE if turns else 0,
        shapes=recipe.shapes,
    )


def _export(
    recipe: Recipe, backbone: Backbone, compressor: Compressor, model: CompressionModel, path: Path
) -> Path:
    model.eval()
    if recipe.from_scratch:
        from etcbench.micro.untrained import save

        save(backbone.model, backbone.processor, path)
    else:
        from etcbench.checkpoints import save_checkpoint

        weights = {
            name: value
            for name, value in model.state_dict().items()
            if not name.startswith("auxiliary")
        }
        save_checkpoint(path, compressor, backbone, weights, asdict(recipe))
    return path
