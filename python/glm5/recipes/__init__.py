"""Recipes: what a run is, in one TOML file. Reads, checks and overrides them; carries nothing out."""

from glm5.recipes.load import RecipeError, load_recipe, recipe_names
from glm5.recipes.schema import Recipe, StageRecipe

__all__ = ["Recipe", "RecipeError", "StageRecipe", "load_recipe", "recipe_names"]
