"""What a float32 solve of a cell reports is so: recomputed in float64, at the state it returned."""

from __future__ import annotations

import copy

import pytest
import torch

from deq_lm.cells import CoarseRate, MonotoneConfig, MultiscaleConfig, TransformerXLConfig
from deq_lm.modeling.builders import build_cell
from deq_lm.solvers import Anderson, Broyden, ForwardBackward, PeacemanRachford, Picard, StoppingRule, solve

NUM_CELLS, BATCH, LENGTH, WIDTH = 12, 16, 10, 16
SIZES = {"d_model": WIDTH, "num_heads": 2, "mem_len": 0}
BOTH_SCOPES = [solver(scope=scope) for solver in (Broyden, Anderson) for scope in ("prefix", "sequence")]
COARSE = (CoarseRate(ratio=2, d_model=8, num_heads=2, d_inner=12),)
CELLS = {
    "transformer_xl": (lambda std: TransformerXLConfig(**SIZES, d_inner=24, init_std=std), [*BOTH_SCOPES, Picard()]),
    "monotone": (
        lambda std: MonotoneConfig(**SIZES, init_std=std, prox="tanh"),
        [*BOTH_SCOPES, ForwardBackward(), PeacemanRachford()],
    ),
    "multiscale": (
        lambda std: MultiscaleConfig(**SIZES, d_inner=24, init_std=std, coarse=COARSE),
        [*BOTH_SCOPES, Picard()],
    ),
}


@pytest.mark.parametrize("rtol", [1e-2, 1e-4])
@pytest.mark.parametrize("name", CELLS)
def test_of_random_cells_what_is_called_converged_is_and_the_reported_residual_is_that_of_the_state(name, rtol):
    make, solvers = CELLS[name]
    num_converged = num_solves = 0
    for seed in range(NUM_CELLS):
        torch.manual_seed(seed)
        cell = build_cell(make(0.03 + 0.2 * seed / NUM_CELLS)).eval()
        x = torch.randn(BATCH, LENGTH, WIDTH) * torch.logspace(-1, 1, BATCH)[:, None, None]
        solver = solvers[seed % len(solvers)]
        with torch.no_grad():
            f, exact = cell.bind(x), copy.deepcopy(cell).double().bind(x.double())
            z0 = torch.zeros_like(cell.as_state(x))
            solution = solve(f, z0, solver=solver, stopping=StoppingRule(max_steps=60, rtol=rtol))
            assert solution.z.dtype == torch.float32
            z = solution.z.double()
            image = exact(z)
        residual = (image - z).flatten(1).norm(dim=1) / image.flatten(1).norm(dim=1)
        converged = solution.converged
        assert (residual[converged] <= 1.05 * rtol).all()
        torch.testing.assert_close(solution.relative_residual.double(), residual, rtol=0.1, atol=0)
        num_converged += int(converged.sum())
        num_solves += BATCH
    assert num_solves == 192
    assert 0.5 * num_solves < num_converged
