"""Named training recipes (YAML) and how to run one from the first step to a checkpoint."""

from etcbench.recipes.recipe import Recipe, load_recipe, recipe_names
from etcbench.recipes.run import train

__all__ = ["Recipe", "load_recipe", "recipe_names", "train"]
