"""Where a stage's samples come from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etcbench.errors import UsageError
from etcbench.recipes.recipe import Recipe
from etcbench.training import Conversations, Stage


@dataclass(frozen=True)
class Known:
    """A data set with a name, and where its parts lie in its folder.

    Attributes
    ----------
    file, images : str
        The json file, and the folder that its pictures' names are relative to.
    samples : int
        How many it has, so that a run can be planned without it.
    """

    file: str
    images: str
    samples: int


# LLaVA's own layout ("playground/data") and counts.
KNOWN = {
    "llava-mix665k": Known("llava_v1_5_mix665k.json", ".", 665_298),
    "llava-pretrain-558k": Known(
        "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", "LLaVA-Pretrain/images", 558_128
    ),
    # What `etcbench.recipes.own_answers` writes; so many by the command in docs/twigvlm.md.
    "own-answers": Known("answers.json", ".", 12_500),
}
MICRO = "micro"


def data_of(recipe: Recipe, stage: Stage) -> str:
    """Name of the data of a stage."""
    return stage.data or recipe.data


def samples_of(recipe: Recipe, stage: Stage) -> int | None:
    """Count the samples of one pass, as far as it is known without the data; None: endless.

    Raises
    ------
    UsageError
        If neither the data nor its size is known.
    """
    name = data_of(recipe, stage)
    if name == MICRO:
        return None
    if name in KNOWN and recipe.data_folder is None:
        return KNOWN[name].samples
    found: int = open_source(recipe, stage).size
    return found


def open_source(recipe: Recipe, stage: Stage) -> Any:
    """Open the samples of a stage: an object with ``sample(index)``, and ``size`` if it has an end.

    Raises
    ------
    UsageError
        If the data are not there; says how to name them.
    """
    name = data_of(recipe, stage)
    if name == MICRO:
        return _micro(recipe, stage)
    images = stage.images or recipe.images
    if name in KNOWN:
        if recipe.data_folder is None:
            raise UsageError(
                f"recipe {recipe.name} trains on {name}: give the folder that has "
                f"{KNOWN[name].file} and its pictures with --data DIR, or a json file in LLaVA's "
                "format with --data FILE"
            )
        folder = Path(recipe.data_folder)
        file = folder / KNOWN[name].file
        images = images or str(folder / KNOWN[name].images)
    else:
        file = Path(name)
        if file.suffix not in (".json", ".jsonl"):
            raise UsageError(
                f"recipe {recipe.name}: unknown data {name!r}; give a json file in LLaVA's format, "
                f"or one of {', '.join((MICRO, *KNOWN))}"
            )
    return Conversations(
        file,
        None if images is None else Path(images),
        stage.batch_size,
        recipe.seed,
        stage.group_by_modality,
        recipe.missing_images,
    )


def _micro(recipe: Recipe, stage: Stage) -> Any:
    from etcbench.micro.stream import BLIND_SHARE, TurnStream

    turns = recipe.turns if stage.turns is None else stage.turns
    return TurnStream(
        seed=recipe.seed,
        turns=turns,
        mix=stage.mix,
        blind_share=BLIND_SHARE if turns else 0,
        shapes=recipe.shapes,  # type: ignore[arg-type]
    )
