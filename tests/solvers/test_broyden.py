"""What is particular to Broyden's methods: secant equation, termination, restarts, memory."""

import pytest
import torch
from problems import linear, linear_map

from deq_lm.solvers import Broyden, StoppingRule, solve
from deq_lm.solvers.broyden import BroydenState
from deq_lm.solvers.secant_history import SecantHistory


@pytest.mark.parametrize("dimension", [2, 5, 12])
def test_first_method_solves_a_linear_problem_of_dimension_n_within_2n_plus_1_evaluations(dimension: int):
    generator = torch.Generator().manual_seed(dimension)
    matrix = torch.randn(dimension, dimension, dtype=torch.float64, generator=generator)
    f = linear_map(matrix, torch.randn(4, 1, dimension, dtype=torch.float64, generator=generator))
    solver = Broyden(scope="sequence", history_size=2 * dimension)
    rule = StoppingRule(max_steps=4 * dimension, rtol=1e-7, divergence_factor=None)
    solution = solve(f, torch.zeros(4, 1, dimension, dtype=torch.float64), solver=solver, stopping=rule)
    assert solution.converged.all()
    assert (solution.num_evaluations <= 2 * dimension + 1).all()


@pytest.mark.parametrize("scope", ["prefix", "sequence"])
@pytest.mark.parametrize("history_size", [1, 2, 5])
def test_newest_secant_equation_holds_exactly_whatever_was_evicted(scope, history_size: int):
    problem = linear("linear", 0.9)
    solver = Broyden(scope=scope, history_size=history_size, restart_growth=float("inf"))
    state = solver.init(problem.f, problem.z0)
    for _ in range(8):
        previous, state = state, solver.step(problem.f, state, None)
    # With H Delta_residual = Delta_z, a step from the newest residual difference undoes it: gamma is 1 for the newest pair.
    change = (state.residual - previous.residual).reshape(*state.lowest.shape, -1)
    assert isinstance(state, BroydenState)
    if scope == "prefix":
        (projections,) = state.history.products(1, change)
        gamma = solver._second(state.history, state.products, projections)
    else:
        (projections,) = state.history.products(1, change)
        gamma = solver._first(state.history, state.products, projections)
    expected = torch.zeros_like(gamma)
    expected[..., state.history.newest] = 1.0
    torch.testing.assert_close(gamma, expected, rtol=0, atol=1e-9)


def test_the_ring_keeps_the_newest_pairs_in_order():
    history = SecantHistory(torch.zeros(1, 1, 2), capacity=3)
    for number in range(1, 6):
        history.append(torch.full((1, 1, 2), float(number)), torch.full((1, 1, 2), 10.0 * number))
    assert len(history) == 3
    assert history.chronological(history.rows[0][..., 0], 1).tolist() == [[[3.0, 4.0, 5.0]]]
    order = torch.tensor([[[1.0, 2.0, 3.0]]])
    assert torch.equal(history.chronological(history.ring_order(order), 1), order)


def test_limited_memory_never_blows_up_on_a_map_it_cannot_solve():
    problem = linear("hard", 1.5, length=6, width=6)
    for scope in ("prefix", "sequence"):
        solver = Broyden(scope=scope, history_size=3)
        rule = StoppingRule(max_steps=300, rtol=1e-12, patience=None, divergence_factor=None)
        assert solve(problem.f, problem.z0, solver=solver, stopping=rule).z.isfinite().all()


def test_a_prefix_whose_residual_grows_forgets_its_pairs_and_the_others_keep_theirs():
    solver = Broyden(history_size=8, restart_growth=1.1)
    x = torch.ones(1, 2, 3, dtype=torch.float64)
    calls = 0

    def f(z: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        image = 0.5 * z + x
        if calls == 8:
            image[:, 1] += 100.0  # the second position's residual jumps once
        return image + 0.01 * z.sin()

    state = solver.init(f, 0 * x)
    for _ in range(7):
        state = solver.step(f, state, None)
    assert isinstance(state, BroydenState)
    assert state.history.usable[0, 0].all()
    assert not state.history.usable[0, 1].any()


def test_memory_does_not_depend_on_the_step_budget():
    problem = linear("linear", 0.9)
    solver = Broyden(history_size=4)
    state = solver.init(problem.f, problem.z0)
    for _ in range(20):
        state = solver.step(problem.f, state, None)
    assert isinstance(state, BroydenState)
    assert sum(ring.numel() for ring in state.history.rows) == 2 * 4 * problem.z0.numel()
