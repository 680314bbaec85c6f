"""How a model is trained: recipe, loop, checkpoints, run folder."""

from deq_lm.training.loop import train
from deq_lm.training.recipe import Recipe, load_recipe, recipe_text

__all__ = ["Recipe", "load_recipe", "recipe_text", "train"]
