"""Gradients of the monotone cell: by the splittings' adjoint, by those of other solvers, unrolled, by dense matrices."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from deq_lm.adjoints import Adjoint, Implicit, Unrolled
from deq_lm.cells import Memory, MonotoneCell, MonotoneConfig
from deq_lm.cells.monotone import BoundMonotoneCell
from deq_lm.solvers import (
    Anderson,
    Broyden,
    FixedPointSolver,
    ForwardBackward,
    PeacemanRachford,
    Solution,
    StoppingRule,
    solve,
)

BATCH, LENGTH, WIDTH = 2, 7, 8
TIGHT = StoppingRule(max_steps=5000, rtol=1e-13, patience=None)
FORWARD = partial(solve, solver=PeacemanRachford(), stopping=TIGHT)
ADJOINTS = [ForwardBackward(), PeacemanRachford(), PeacemanRachford(step_size=3.0), Broyden(), Anderson()]


def bound(prox: str, *, padded: bool = False) -> tuple[MonotoneCell, BoundMonotoneCell]:
    torch.manual_seed(0)
    config = MonotoneConfig(d_model=WIDTH, num_heads=2, num_taps=3, margin=0.3, prox=prox, init_std=0.3)  # type: ignore[arg-type]
    cell = MonotoneCell(config).double()
    x = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64)
    memory = Memory(torch.randn(BATCH, 4, WIDTH).double(), torch.randn(BATCH, 4, WIDTH).double())
    key_mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    key_mask[0, 2] = not padded
    return cell, cell.bind(x, memory, key_mask if padded else None)


def gradients(cell: MonotoneCell, f: BoundMonotoneCell, adjoint: Adjoint, run=FORWARD, **options) -> list[Tensor]:
    output, _ = adjoint.apply(f, torch.zeros(BATCH, LENGTH, WIDTH, dtype=torch.float64), run, **options)
    cotangent = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return list(torch.autograd.grad(output, list(cell.parameters()), cotangent, retain_graph=True))


@pytest.mark.parametrize("solver", ADJOINTS, ids=str)
@pytest.mark.parametrize("prox", ["relu", "soft_threshold", "tanh"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_every_adjoint_gives_the_gradient_of_the_unrolled_splitting(solver: FixedPointSolver, prox: str, padded: bool):
    cell, f = bound(prox, padded=padded)
    unrolled = gradients(cell, f, Unrolled(), partial(solve, solver=PeacemanRachford(), stopping=TIGHT))
    found = gradients(cell, f, Implicit(solver=solver, stopping=TIGHT))
    for one, wanted in zip(found, unrolled, strict=True):
        assert wanted.norm() > 0
        assert torch.dist(one, wanted) <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("solver", [ForwardBackward(), PeacemanRachford()], ids=str)
def test_the_adjoint_solves_the_dense_transposed_equation(solver: FixedPointSolver):
    """u = (I - J^T)^-1 g by the whole Jacobian at the solution."""
    _, f = bound("relu")
    z = FORWARD(f, torch.zeros(BATCH, LENGTH, WIDTH, dtype=torch.float64)).z
    cotangent = torch.randn(z.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    f = f.with_inputs([tensor.detach() for tensor in f.inputs])
    jacobian = torch.autograd.functional.jacobian(f, z).flatten(3).flatten(0, 2)
    identity = torch.eye(len(jacobian), dtype=torch.float64)
    expected = torch.linalg.solve((identity - jacobian).T, cotangent.flatten()).view_as(z)
    adjoint = Implicit(solver=solver, stopping=TIGHT)
    u, solution = adjoint.adjoint_solve(f, f(z), z, cotangent)
    torch.testing.assert_close(u, expected, rtol=0, atol=1e-10)
    assert solution.converged.all()


def test_the_first_position_waits_for_all_later_ones_in_the_adjoint_solve():
    """Influence runs from later to earlier positions: a prefix of reversed time is a suffix."""
    reports: list[Solution] = []
    cell, f = bound("relu")
    gradients(cell, f, Implicit(solver=PeacemanRachford(), stopping=TIGHT), report=reports.append)
    assert (reports[0].position_num_steps.diff(dim=1) <= 0).all()
    assert (reports[0].position_num_steps.diff(dim=1) < 0).any()


def test_gradcheck_of_the_whole_solve_with_its_adjoint():
    _, f = bound("tanh")
    adjoint = Implicit(solver=PeacemanRachford(), stopping=TIGHT)
    inputs = [tensor.detach().requires_grad_() for tensor in f.inputs]

    def output(*tensors: Tensor) -> Tensor:
        return adjoint.apply(f.with_inputs(tensors), torch.zeros(BATCH, LENGTH, WIDTH).double(), FORWARD)[0]

    assert torch.autograd.gradcheck(output, inputs, eps=1e-6, atol=1e-6, fast_mode=True)
