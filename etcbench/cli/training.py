"""``etcbench train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from etcbench.cli.app import app, examples
from etcbench.errors import UsageError


@app.command(
    epilog=examples(
        "etcbench train --method etc --tokens 1",
        "etcbench train --config micro-llava --out runs/training/micro-llava",
    )
)
def train(
    method: Annotated[str | None, typer.Option(help="Method; needs a recipe for it.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Budget to train for.", min=1)] = None,
    model: Annotated[str | None, typer.Option(help="Model; default: the recipe's.")] = None,
    data: Annotated[str | None, typer.Option(help="Training data; default: the recipe's.")] = None,
    config: Annotated[
        str | None, typer.Option(help="Recipe, a name or a YAML file; default: the method's.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed; default: the recipe's.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Output folder; default: runs/training/<recipe>.")
    ] = None,
) -> None:
    """Train a method, or the embedded model.

    Takes the recipe that comes with the package for the method, or one of your own. The same
    command again continues a training that stopped.
    """
    from etcbench.console import notice, quiet_libraries
    from etcbench.recipes import load_recipe
    from etcbench.recipes import train as run_recipe

    quiet_libraries()
    name = config or _recipe_for(method, tokens)
    recipe = load_recipe(name, method=method, tokens=tokens, model=model, data=data, seed=seed)
    folder = out or Path("runs/training") / recipe.name
    notice(f"recipe {recipe.name}: {recipe.method} on {recipe.model}, into {folder}")
    result = run_recipe(recipe, folder)
    notice(f"trained: {result}")
    print(result)


def _recipe_for(method: str | None, tokens: int | None) -> str:
    """Name of the recipe for a method: of that budget if there is one, else of any."""
    from etcbench.recipes import load_recipe, recipe_names

    recipes = [load_recipe(name) for name in recipe_names()]
    fitting = [recipe for recipe in recipes if method and recipe.method == method]
    if not fitting:
        known = ", ".join(f"{recipe.name} ({recipe.method})" for recipe in recipes)
        wanted = f"for method {method!r}" if method else "named"
        raise UsageError(f"no recipe {wanted}; there is {known}, or give a YAML file with --config")
    return min(fitting, key=lambda recipe: recipe.tokens != tokens).name
