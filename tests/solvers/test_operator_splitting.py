"""Operator splittings keep what is proved of them: rates, the limit of forward-backward, Peaceman-Rachford's freedom."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from dense_form import DenseForm, monotone, monotone_matrix
from torch import Tensor

from deq_lm.solvers import ForwardBackward, Outcome, PeacemanRachford, StoppingRule, solve
from deq_lm.solvers.operator_splitting import Splitting


def states_of(form: DenseForm, solver: Splitting, z0: Tensor, num_steps: int) -> list[Tensor]:
    """z_0, ..., z_k."""
    state = solver.init(form, z0)
    states = [state.point]
    for _ in range(num_steps):
        state = solver.step(form, state, None)
        states.append(state.point)
    return states


def start(seed: int) -> Tensor:
    return 10 * torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def distances(states: list[Tensor], z_star: Tensor) -> Tensor:
    """(k + 1, B)."""
    return torch.stack([(z - z_star).flatten(1).norm(dim=1) for z in states])


@pytest.mark.parametrize("share", [None, 0.1, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_forward_backward_is_at_least_as_fast_as_proved(share: float | None, seed: int):
    problem = monotone(seed=seed)
    form = problem.f
    assert isinstance(form, DenseForm)
    solver = ForwardBackward(step_size=None if share is None else share * 2 * form.margin / form.lipschitz**2)
    rate = solver.rate(form, solver.step_size or solver.best_step_size(form))
    assert rate < 1
    errors = distances(states_of(form, solver, start(seed), 60), problem.z_star)
    powers = rate ** torch.arange(61, dtype=torch.float64)
    assert (errors <= powers[:, None] * errors[0] * (1 + 1e-9) + 1e-12).all()


@pytest.mark.parametrize("step_size", [None, 0.05, 0.5, 4.0, 50.0])
@pytest.mark.parametrize("seed", range(3))
def test_peaceman_rachford_is_at_least_as_fast_as_proved_at_any_step(step_size: float | None, seed: int):
    problem = monotone(seed=seed)
    form = problem.f
    assert isinstance(form, DenseForm)
    solver = PeacemanRachford(step_size=step_size)
    step = solver.best_step_size(form) if step_size is None else step_size
    z0, rate = start(seed), solver.rate(form, step)
    assert rate < 1

    def dual(z: Tensor) -> Tensor:
        return z + step * (z - form.affine(z))

    bound = (dual(z0) - dual(problem.z_star)).flatten(1).norm(dim=1) / (1 + step * form.margin)
    errors = distances(states_of(form, solver, z0, 60), problem.z_star)
    powers = rate ** torch.arange(61, dtype=torch.float64)
    assert (errors <= powers[:, None] * bound * (1 + 1e-9) + 1e-12).all()


def spinning(margin: float, turn: float) -> DenseForm:
    """F = m I + a rotation's generator: the map for which the limit of forward-backward is exactly 2 m / L^2."""
    block = torch.tensor([[1 - margin, turn], [-turn, 1 - margin]], dtype=torch.float64)
    offset = torch.ones(1, 3, 2, dtype=torch.float64)
    return DenseForm(torch.kron(torch.eye(3, dtype=torch.float64), block), offset, lambda v, step: v.clone())


def test_the_limit_of_forward_backward_is_sharp_and_peaceman_rachford_has_none():
    form = spinning(0.3, 2.0)
    limit = 2 * form.margin / form.lipschitz**2
    rule = StoppingRule(max_steps=3000, rtol=1e-8, patience=None)
    z0 = torch.zeros_like(form.offset)
    below = solve(form, z0, solver=ForwardBackward(step_size=0.7 * limit), stopping=rule)
    above = solve(form, z0, solver=ForwardBackward(step_size=1.1 * limit), stopping=rule)
    assert below.converged.all()
    assert above.outcome.tolist() == [Outcome.DIVERGED]
    for step_size in (0.05, 1.1 * limit, 5.0):
        solution = solve(form, z0, solver=PeacemanRachford(step_size=step_size), stopping=rule)
        assert solution.converged.all()
        torch.testing.assert_close(solution.z, below.z, rtol=0, atol=1e-6)


@pytest.mark.parametrize("solver", [ForwardBackward(step_size=0.05), PeacemanRachford(step_size=0.8)], ids=str)
def test_on_the_worst_map_the_rate_is_exactly_the_proved_one(solver: Splitting):
    form = spinning(0.3, 2.0)
    z_star = PeacemanRachford(step_size=1e9).init(form, form.offset).resolvent(0 * form.offset)  # F(z) = 0
    assert solver.step_size is not None
    errors = distances(states_of(form, solver, 5 * form.offset, 12), z_star)
    expected = torch.full_like(errors[1:], solver.rate(form, solver.step_size))
    torch.testing.assert_close(errors[1:] / errors[:-1], expected, rtol=1e-6, atol=0)


def test_without_a_given_step_the_best_proved_rate_is_taken():
    form = monotone().f
    assert isinstance(form, DenseForm)
    for solver in (ForwardBackward(), PeacemanRachford()):
        best = solver.best_step_size(form)
        assert solver.init(form, start(0)).step_size == best
        for other in (0.9 * best, 1.1 * best):
            assert solver.rate(form, best) < solver.rate(form, other)


@pytest.mark.parametrize("solver", [ForwardBackward(), PeacemanRachford(), PeacemanRachford(step_size=0.3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_position_that_has_stopped_keeps_state_and_image_to_the_bit(solver: Splitting, dtype: torch.dtype):
    problem = monotone(length=6)
    form = replace(problem.f, matrix=problem.f.matrix.to(dtype), offset=problem.f.offset.to(dtype))
    state = solver.init(form, start(0).to(dtype).repeat(1, 2, 1)[:, :6])
    for _ in range(5):
        state = solver.step(form, state, None)
    active = torch.arange(6).expand(3, 6) >= 2
    later = state
    for _ in range(30):
        later = solver.step(form, later, active)
    for fact in ("point", "image", "argument"):
        assert torch.equal(getattr(later, fact)[:, :2], getattr(state, fact)[:, :2]), fact
    torch.testing.assert_close(later.image, form(later.point), rtol=0, atol=200 * torch.finfo(dtype).eps)
    moved = (later.image - later.point).norm() / (state.image - state.point).norm()
    assert moved < 1  # the others went on with the stopped ones where these stand


@pytest.mark.parametrize("solver", [ForwardBackward(), PeacemanRachford()], ids=str)
def test_the_steps_can_be_recorded_and_have_the_gradient_of_the_solution(solver: Splitting):
    matrix = monotone_matrix(length=3, width=2, seed=0)
    rule = StoppingRule.fixed(100)

    def solved(offset: Tensor) -> Tensor:
        form = DenseForm(matrix, offset)
        return solve(form, torch.zeros_like(offset), solver=solver, stopping=rule, differentiable=True).image

    offset = torch.randn(2, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(solved, (offset,), fast_mode=True)


@pytest.mark.parametrize("solver", [ForwardBackward(), PeacemanRachford()], ids=str)
def test_a_map_that_does_not_come_apart_is_refused_with_what_to_do(solver: Splitting):
    with pytest.raises(
        ValueError, match=r"expected an f that offers `proximal_form`.*cell 'monotone'.*such as Broyden"
    ):
        solve(torch.tanh, torch.zeros(1, 2, 3), solver=solver)


@pytest.mark.parametrize("step_size", [0.0, -1.0, math.inf, math.nan])
def test_a_step_that_is_none_is_refused(step_size: float):
    with pytest.raises(ValueError, match="expected a value above 0, or None"):
        PeacemanRachford(step_size=step_size)
