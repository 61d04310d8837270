"""``etcbench train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from etcbench.cli.app import Json, app, examples
from etcbench.errors import UsageError


@app.command(
    epilog=examples(
        "etcbench train --method etc --tokens 1",
        "etcbench train --recipe micro-llava --out runs/training/micro-llava",
        "etcbench train --recipe etc-llava-1.5-7b --dry-run --accelerate-config fsdp.yaml",
        "accelerate launch -m etcbench train --recipe etc-llava-1.5-7b --data playground/data",
    )
)
def train(
    method: Annotated[str | None, typer.Option(help="Method; needs a recipe for it.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Budget to train for.", min=1)] = None,
    model: Annotated[str | None, typer.Option(help="Model; default: the recipe's.")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Json file in LLaVA's format, or folder of the recipe's data sets."),
    ] = None,
    images: Annotated[
        str | None, typer.Option(help="Folder of the pictures; default: the data's own.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe", "--config", help="Recipe, a name or a YAML file; default: the method's."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="FIELD=VALUE", help="Change a field, e.g. options.alpha=0.2."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed; default: the recipe's.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Output folder; default: runs/training/<recipe>.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what it would take; no weights, no data.")
    ] = False,
    accelerate_config: Annotated[
        Path | None, typer.Option(help="accelerate's config file that a dry run plans for.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a method, or the embedded model.

    Takes the recipe that comes with the package for the method, or one of your own. The same
    command again continues a training that stopped.
    """
    from etcbench.console import notice, quiet_libraries
    from etcbench.recipes import load_recipe

    quiet_libraries()
    chosen = load_recipe(
        recipe or _recipe_for(method, tokens, model),
        settings or (),
        method=method,
        tokens=tokens,
        model=model,
        data=data,
        images=images,
        seed=seed,
    )
    if dry_run:
        from etcbench.recipes.plan import plan, show_plan

        show_plan(plan(chosen, accelerate_config), as_json)
        return
    if accelerate_config is not None:
        raise UsageError(
            "--accelerate-config is for --dry-run; to train with it: accelerate launch "
            f"--config_file {accelerate_config} -m etcbench train ..."
        )
    from accelerate import PartialState

    from etcbench.recipes import train as run_recipe

    folder = out or Path("runs/training") / chosen.name
    notice(f"recipe {chosen.name}: {chosen.method} on {chosen.model}, into {folder}")
    result = run_recipe(chosen, folder)
    if PartialState().is_main_process:
        notice(f"trained: {result}")
        print(result)


def _recipe_for(method: str | None, tokens: int | None, model: str | None) -> str:
    """Name of the recipe for a method: for the model and budget if there is one, else any."""
    from etcbench.backbones.loading import default_model, micro_models
    from etcbench.recipes import load_recipe, recipe_names

    recipes = [load_recipe(name) for name in recipe_names()]
    fitting = [recipe for recipe in recipes if method and recipe.method == method]
    if not fitting:
        known = ", ".join(f"{recipe.name} ({recipe.method})" for recipe in recipes)
        wanted = f"for method {method!r}" if method else "named"
        raise UsageError(f"no recipe {wanted}; there is {known}, or give a YAML file with --recipe")
    model = model or default_model()
    small = micro_models()
    return min(
        fitting,
        key=lambda recipe: (
            recipe.model != model,
            (recipe.model in small) != (model in small),
            recipe.tokens != tokens,
        ),
    ).name
