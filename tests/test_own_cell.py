"""recipes/own_cell.py, the example to start from, is run."""

import runpy
from pathlib import Path

import torch

EXAMPLE = Path(__file__).resolve().parents[1] / "recipes" / "own_cell.py"


def test_the_example_learns_its_task():
    with torch.random.fork_rng():
        names = runpy.run_path(str(EXAMPLE))
    assert names["accuracy"] > 0.85
    assert names["solution"].converged.float().mean() > 0.9
