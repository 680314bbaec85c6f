"""Where f's precision ends before the tolerance, a solve ends soon after it has got as far as it will."""

import pytest
import torch
from torch import Tensor

from deq_lm.cells import TransformerXLCell, TransformerXLConfig
from deq_lm.cells.monotone import MonotoneCell, MonotoneConfig
from deq_lm.solvers import (
    Anderson,
    Broyden,
    FixedPointSolver,
    ForwardBackward,
    Outcome,
    Picard,
    Solution,
    StoppingRule,
    solve,
)
from deq_lm.solvers import stopping as rules
from deq_lm.solvers.norms import spacing

MAX_STEPS = 60
SOLVERS = [Broyden(), Broyden(scope="sequence"), Anderson(), Anderson(scope="sequence")]
every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: f"{type(s).__name__} {s.scope}")


def in_bfloat16(solver: FixedPointSolver, rule: StoppingRule) -> Solution:
    """Of a Transformer-XL cell with drawn weights, in mixed precision."""
    with torch.random.fork_rng([]), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(0)
        cell = TransformerXLCell(TransformerXLConfig(d_model=32, num_heads=4, d_inner=64, mem_len=0, init_std=0.12))
        x = 2.0 * torch.randn(6, 16, 32)
        return solve(cell.bind(x), torch.zeros_like(x), solver=solver, stopping=rule)


class Watched(StoppingRule):
    """Keeps the relative residual of every unit at every evaluation."""

    def _judge(self, progress, norm, image_norm):
        self.seen.append(norm / image_norm)
        return super()._judge(progress, norm, image_norm)


@every_solver
def test_a_solve_in_bfloat16_stalls_within_five_evaluations_of_its_floor_and_reports_it(solver: FixedPointSolver):
    watched = Watched(max_steps=MAX_STEPS, rtol=1e-3, patience=None)
    object.__setattr__(watched, "seen", [])
    assert not in_bfloat16(solver, watched).converged.any()
    residuals = torch.stack(watched.seen)  # (K, B, U)
    floor = residuals.amin(dim=0)
    reached = 1 + (residuals <= 2 * floor).int().argmax(dim=0)  # noise is a factor of two
    last_to_reach = reached.amax(dim=1)  # a sequence stalls no sooner than all of its prefixes

    solution = in_bfloat16(solver, StoppingRule(max_steps=MAX_STEPS, rtol=1e-3))
    assert solution.outcome.tolist() == [Outcome.STALLED] * 6
    to_return_to_the_best = int(solver.scope == "sequence")  # costs one more
    assert (solution.num_evaluations - last_to_reach).max() <= 5 + to_return_to_the_best
    assert (solution.relative_residual < 3 * floor[:, -1]).all()


@every_solver
@pytest.mark.parametrize("rtol", [4e-3, 1e-2])
def test_a_tolerance_above_bfloat16s_rounding_is_solved_as_if_there_were_no_floor(solver, rtol, monkeypatch):
    rule = StoppingRule(max_steps=MAX_STEPS, rtol=rtol)
    found = in_bfloat16(solver, rule)
    assert found.converged.all() or rtol < 1e-2
    monkeypatch.setattr(rules, "AT_FLOOR", 0.0)
    expected = in_bfloat16(solver, rule)
    assert torch.equal(found.z, expected.z)
    assert torch.equal(found.outcome, expected.outcome)


@every_solver
@pytest.mark.parametrize("rtol", [1e-7, 1e-3])
def test_in_float32_no_tolerance_that_can_be_met_is_touched(solver: FixedPointSolver, rtol: float, monkeypatch):
    torch.manual_seed(0)
    cell = TransformerXLCell(TransformerXLConfig(d_model=32, num_heads=4, d_inner=64, mem_len=0, init_std=0.12))
    x = 2.0 * torch.randn(6, 16, 32)
    solutions = []
    for at_floor in (0.0, rules.AT_FLOOR, float("inf")):
        monkeypatch.setattr(rules, "AT_FLOOR", at_floor)
        with torch.no_grad():
            rule = StoppingRule(max_steps=MAX_STEPS, rtol=rtol)
            solutions.append(solve(cell.bind(x), torch.zeros_like(x), solver=solver, stopping=rule))
    for fact in ("z", "outcome", "num_evaluations"):
        assert torch.equal(getattr(solutions[0], fact), getattr(solutions[1], fact)), fact
        assert torch.equal(getattr(solutions[0], fact), getattr(solutions[2], fact)), fact


@pytest.mark.parametrize(
    ("rate", "rtol", "outcome"),
    [
        (0.83, 1e-3, Outcome.CONVERGED),  # halves in four steps
        (0.95, 1e-3, Outcome.STALLED),  # slower is taken for noise, at a tolerance that noise would not let it reach
        (0.98, 4e-3, Outcome.CONVERGED),
    ],
)
def test_a_residual_that_falls_is_no_noise(rate: float, rtol: float, outcome: Outcome):
    rule = StoppingRule(max_steps=1000, rtol=rtol, patience=60)
    image = torch.ones(1, 1)
    progress = rule.begin(image, image, 1, spacing(torch.bfloat16))
    for step in range(1, 1000):
        progress = rule.advance(progress, rate**step * image, image, 1)
        if not progress.active.any():
            break
    assert progress.outcome.item() == outcome
    if outcome == Outcome.STALLED:
        assert rtol < progress.norm.item() < 1.5 * spacing(torch.bfloat16)


def slow(z: Tensor) -> Tensor:
    return 0.95 * z + 1


def test_the_floor_is_that_of_the_precision_f_computes_in_and_not_that_of_the_moment():
    start, rule = torch.zeros(1, 4, 3), StoppingRule(max_steps=600, rtol=1e-3, patience=600)
    assert solve(slow, start, solver=Picard(), stopping=rule).converged.all()
    with torch.autocast("cpu", torch.bfloat16):
        assert solve(slow, start, solver=Picard(), stopping=rule).outcome.item() == Outcome.STALLED
        torch.manual_seed(0)
        cell = MonotoneCell(MonotoneConfig(d_model=8, num_heads=2, mem_len=0, margin=0.1, prox="tanh"))
        x = torch.randn(2, 8, 8)
        solution = solve(cell.bind(x), torch.zeros_like(x), solver=ForwardBackward(), stopping=rule)
    assert solution.converged.all()  # it computes in float32 and says so
    assert solution.num_evaluations.min() > 30
    assert (solution.relative_residual <= 1e-3).all()
    in_half = solve(lambda z: slow(z).bfloat16(), start, solver=Picard(), stopping=rule)
    assert in_half.outcome.item() == Outcome.STALLED
