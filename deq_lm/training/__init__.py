"""How a model is trained: recipe, loop, checkpoints, run folder."""
