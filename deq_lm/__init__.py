"""Deep equilibrium language models."""
