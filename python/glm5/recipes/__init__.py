"""Recipes: what a run is, in one TOML file. Reads, checks and overrides them; carries nothing out."""

from glm5.recipes.data_schema import BuildRecipe
from glm5.recipes.load import RecipeError, data_recipe_names, load_data_recipe, load_recipe, recipe_names
from glm5.recipes.schema import Recipe, StageRecipe

__all__ = [
    "BuildRecipe",
    "Recipe",
    "RecipeError",
    "StageRecipe",
    "data_recipe_names",
    "load_data_recipe",
    "load_recipe",
    "recipe_names",
]
