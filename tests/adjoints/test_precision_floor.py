"""Where f computes in half precision, the adjoint equation has a floor, and its solve ends soon after it."""

from functools import partial

import pytest
import torch
from torch import Tensor

from deq_lm.adjoints import Implicit
from deq_lm.adjoints.implicit import ADJOINT_FLOOR
from deq_lm.cells import TransformerXLCell, TransformerXLConfig
from deq_lm.cells.monotone import MonotoneCell, MonotoneConfig
from deq_lm.solvers import Anderson, Broyden, FixedPointSolver, Outcome, Solution, StoppingRule, solve
from deq_lm.solvers import stopping as rules
from deq_lm.solvers.norms import spacing

MAX_STEPS = 60
SOLVERS = [Broyden(), Broyden(scope="sequence"), Anderson(), Anderson(scope="sequence")]
every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: f"{type(s).__name__} {s.scope}")
TRANSFORMER_XL = TransformerXLConfig(d_model=32, num_heads=4, d_inner=64, mem_len=0, init_std=0.08)
MONOTONE = MonotoneConfig(d_model=32, num_heads=4, mem_len=0, margin=0.3, prox="tanh")


def backward(solver: FixedPointSolver, rtol: float, config=TRANSFORMER_XL, *, half: bool = True) -> Solution:
    """The adjoint solve behind the gradient of a cell with drawn weights, bound in mixed precision or not."""
    reports: list[Solution] = []
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        cell = TransformerXLCell(config) if config is TRANSFORMER_XL else MonotoneCell(config)
        x, cotangent = 2.0 * torch.randn(6, 16, 32), torch.randn(6, 16, 32)
    adjoint = Implicit(solver=solver, stopping=StoppingRule(max_steps=MAX_STEPS, rtol=rtol))
    forward = partial(solve, solver=Broyden(), stopping=StoppingRule(max_steps=MAX_STEPS, rtol=1e-2))
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        output, _ = adjoint.apply(cell.bind(x.requires_grad_()), torch.zeros_like(x), forward, report=reports.append)
    output.backward(cotangent)  # autocast is off, as in training
    return reports[0]


def facts(solution: Solution) -> list[Tensor]:
    return [solution.z, solution.outcome, solution.num_evaluations]


@every_solver
def test_an_adjoint_solve_in_bfloat16_stalls_at_its_floor_and_does_not_run_out_of_steps(solver, monkeypatch):
    solution = backward(solver, 1e-4)
    assert solution.outcome.tolist() == [Outcome.STALLED] * 6
    monkeypatch.setattr(rules, "AT_FLOOR", 0.0)
    to_the_end = backward(solver, 1e-4)
    assert solution.num_evaluations.sum() < 0.6 * to_the_end.num_evaluations.sum()
    assert (solution.relative_residual < 4e-3).all()
    distance = (solution.z - to_the_end.z).flatten(1).norm(dim=1)
    assert (distance < 0.1 * to_the_end.z.flatten(1).norm(dim=1)).all()


@every_solver
def test_a_solve_that_halves_its_residual_goes_below_the_floor_that_is_assumed(solver):
    floor = ADJOINT_FLOOR * spacing(torch.bfloat16)
    below = [(backward(solver, rtol).relative_residual < floor).float().mean().item() for rtol in (1e-3, 1e-4)]
    assert min(below) >= 0.5


@every_solver
def test_a_tolerance_above_the_floor_of_the_adjoint_is_solved_as_if_there_were_none(solver, monkeypatch):
    found = backward(solver, 1e-3)
    assert found.converged.sum() >= 4
    monkeypatch.setattr(rules, "AT_FLOOR", 0.0)
    assert all(map(torch.equal, facts(found), facts(backward(solver, 1e-3))))


@every_solver
@pytest.mark.parametrize(("config", "half"), [(TRANSFORMER_XL, False), (MONOTONE, True)], ids=["float32", "monotone"])
def test_what_computes_in_float32_has_no_such_floor(solver, config, half, monkeypatch):
    found = backward(solver, 1e-5, config, half=half)
    assert found.converged.sum() >= 4
    monkeypatch.setattr(rules, "AT_FLOOR", 0.0)
    assert all(map(torch.equal, facts(found), facts(backward(solver, 1e-5, config, half=half))))
