"""The estimate that the adjoint-reuse benchmark tries is the transpose of the solver's own inverse."""

import importlib
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parents[2] / "eval" / "benchmarks"


def test_the_estimate_is_the_transposed_inverse(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    reuse = importlib.import_module("adjoint_reuse")
    generator = torch.Generator().manual_seed(0)
    matrix = 0.3 * torch.randn(6, 6, dtype=torch.float64, generator=generator)
    x = torch.randn(1, 1, 6, dtype=torch.float64, generator=generator)
    _, steps = reuse.forward_steps(lambda z: z @ matrix.T + x, x, 1e-3)
    inverse = torch.eye(6, dtype=torch.float64)
    for j in range(len(steps) - 1):
        s, following = steps[j, 0], steps[j + 1, 0]
        inverse = inverse + torch.outer(following, s @ inverse) / s.square().sum()
    cotangent = torch.randn(1, 1, 6, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(reuse.estimate(steps, cotangent).flatten(), inverse.T @ cotangent.flatten())
