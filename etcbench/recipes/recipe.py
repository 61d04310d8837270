"""What determines a training run, read from YAML, every field checked by name and type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from etcbench import registry
from etcbench.adapters import LoRA
from etcbench.compressor import Budget, Compressor, ModelSpec
from etcbench.errors import UsageError, unknown_name
from etcbench.options import convert, typed_options
from etcbench.training.stage import Stage

FOLDER = Path(__file__).parent
EXCLUDING = {"steps": "epochs", "epochs": "steps"}  # a stage has one of them


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
        ``"micro"`` (the embedded stream of scenes), a json file in LLaVA's format, or a data set
        that `etcbench.recipes.sources` knows by name.
    stages : tuple of Stage
        Run one after the other; stages on the same data take consecutive samples of it.
    tokens : int or None
        Budget.
    options : dict
        Options of the method.
    seed : int
        Seed of weights and data.
    lora : LoRA or None
        Adapter on the language model; None tunes the language model itself.
    precision : {"bf16", "fp32"}
        Arithmetic of the forward and backward passes.
    gradient_checkpointing : bool
        Whether activations inside decoder layers are computed again instead of stored.
    workers : int
        Processes that read samples, for each training process.
    data_folder : str or None
        Folder of data sets that are known by name.
    images : str or None
        Folder of the pictures; None: as the data set has it, or that of the json file.
    missing_images : {"error", "skip"}
        What becomes of samples whose picture does not exist.
    max_length : int
        Tokens at which a conversation is cut.
    turns : int
        Question-answer turns per picture (micro).
    from_scratch : bool
        Build the embedded model with random weights instead of loading it.
    warmup_steps : int
        Steps of the vision warm-up that precedes the stages of a micro-llava from scratch.
    storage : {"half", "delta8", "delta4"}
        How the checkpoint keeps tuned weights: in half precision, or as differences to the
        backbone of 8 or 4 bits, which take a half or a good quarter of that.
    shapes : tuple of tuple of int
        Shapes of the pictures, (rows, columns) of cells, which take turns; empty for the data's
        own single shape (micro).
    """

    name: str
    method: str
    model: str
    data: str
    stages: tuple[Stage, ...]
    tokens: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    lora: LoRA | None = None
    precision: Literal["bf16", "fp32"] = "bf16"
    gradient_checkpointing: bool = False
    workers: int = 0
    data_folder: str | None = None
    images: str | None = None
    missing_images: Literal["error", "skip"] = "error"
    max_length: int = 2048
    turns: int = 8
    from_scratch: bool = False
    warmup_steps: int = 0
    storage: Literal["half", "delta8", "delta4"] = "half"
    shapes: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("seed", 0), ("workers", 0), ("turns", 0), ("warmup_steps", 0),
                            ("max_length", 1), ("tokens", 1)):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name} is at least {least}, not {value}")
        if not self.stages:
            raise UsageError("it has no stages")


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_recipe(name: str, settings: Sequence[str] = (), **changes: Any) -> Recipe:
    """Read a recipe by name or from a YAML file, and change fields of it.

    Parameters
    ----------
    name : str
        One of `recipe_names`, or a file.
    settings : sequence of str
        ``PATH=VALUE``, e.g. ``"options.alpha=0.2"`` or ``"stages.0.steps=300"``.
    **changes
        Fields; None leaves one as it is. ``data`` may be the folder of data sets known by name.

    Raises
    ------
    UsageError
        If there is no such recipe, or a field is missing, unknown or of the wrong type.
    """
    path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        raise unknown_name("recipe", name, recipe_names())
    try:
        raw = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UsageError(f"recipe {path} is not YAML: {error}") from error
    if not isinstance(raw, dict):
        raise UsageError(f"recipe {path} is not a mapping of fields")
    changes = {key: value for key, value in changes.items() if value is not None}
    if "data" in changes and Path(changes["data"]).is_dir():
        changes["data_folder"] = changes.pop("data")
    raw |= changes
    for text in settings:
        _set(raw, text)
    recipe: Recipe = _build(Recipe, {"name": path.stem, **raw}, f"recipe {path.stem}")
    texts = {key: value for key, value in recipe.options.items() if isinstance(value, str)}
    kind = registry.load("baselines", recipe.method)
    recipe.options.update(typed_options({recipe.method: kind}, texts)[recipe.method])
    return recipe


def check_trained(recipe: Recipe) -> type[Compressor]:
    """Find the method of a recipe; refuse one that training would leave out.

    Training runs every decoder layer on all visual tokens, so a method that drops them there is
    trained by a loss of its own or not at all: what came out would be a plain tuned model.

    Raises
    ------
    UsageError
        Says how to evaluate such a method on a tuned model.
    """
    kind: type[Compressor] = registry.load("baselines", recipe.method)
    drops = ("select_hidden", "select_prompt")
    learns = ("objective", "training_module")

    def own(hook: str) -> bool:
        return getattr(kind, hook) is not getattr(Compressor, hook)

    if any(map(own, drops)) and not any(map(own, learns)):
        raise UsageError(
            f"{recipe.method} drops tokens inside the decoder and is not trained; train with "
            f"method: full and evaluate {recipe.method} on that model with --checkpoint"
        )
    return kind


def method_of(recipe: Recipe, spec: ModelSpec) -> Compressor:
    """Build the method that a recipe trains.

    Raises
    ------
    UsageError
        As `check_trained`, or if the method cannot serve the budget or has no such option.
    """
    budget = None if recipe.tokens is None else Budget(recipe.tokens)
    return check_trained(recipe).from_budget(budget, spec, **recipe.options)


def _set(raw: dict[str, Any], text: str) -> None:
    """Change one field, which may be deep inside."""
    where, sign, value = text.partition("=")
    if not sign or not where:
        raise UsageError(f"--set {text!r} is not of the form FIELD=VALUE, e.g. options.alpha=0.2")
    *path, last = where.strip().split(".")
    inside: Any = raw
    for step in path:
        if isinstance(inside, list):
            inside = _item(inside, step, text)
        else:
            if inside.get(step) is None:
                inside[step] = {}
            inside = inside[step]
        if not isinstance(inside, dict | list):
            raise UsageError(f"--set {text}: {step} has no fields inside")
    try:
        read = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {text}: the value is not YAML") from error
    if isinstance(inside, list):
        _item(inside, last, text)
        inside[int(last)] = read
    else:
        inside.pop(EXCLUDING.get(last, ""), None)
        inside[last] = read


def _item(items: list[Any], step: str, text: str) -> Any:
    if not step.isdigit() or int(step) >= len(items):
        raise UsageError(f"--set {text}: {step!r} is not one of 0 to {len(items) - 1}")
    return items[int(step)]


def _build(kind: type[Any], raw: Any, where: str) -> Any:
    """Build a dataclass from a mapping, checking names and types."""
    if not isinstance(raw, dict):
        raise UsageError(f"{where} is a mapping of fields, not {raw!r}")
    hints = get_type_hints(kind)
    known = [f.name for f in fields(kind)]
    for key in raw:
        if key not in known:
            raise unknown_name(f"field of {where}", str(key), known)
    values = {key: _typed(value, hints[key], f"{where}: {key}") for key, value in raw.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise UsageError(f"{where}: {str(error).partition(') ')[2] or error}") from error
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error


def _typed(value: Any, hint: Any, what: str) -> Any:
    """Read a value of YAML as the type of a field."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and NoneType in inner:
            return None
        return _typed(value, next(choice for choice in inner if choice is not NoneType), what)
    if hint is Any or (isinstance(hint, type) and is_dataclass(hint) and isinstance(value, hint)):
        return value
    if is_dataclass(hint):
        return _build(hint, value, what)  # type: ignore[arg-type]
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_typed(item, inner[0], f"{what}.{i}") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _typed(item, inner[1], f"{what}.{key}") for key, item in value.items()}
    if isinstance(value, str) and (origin is Literal or hint in (int, float, bool, str)):
        return convert(value, hint, what)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and (hint is bool or value is not True):
        return value
    raise UsageError(f"{what} cannot be {value!r}")
