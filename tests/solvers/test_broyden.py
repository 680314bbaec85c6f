"""What is particular to Broyden's methods: secant equation, termination, restarts, memory."""

import itertools

import pytest
import torch
from problems import linear, linear_map

from deq_lm.evaluation.peak_memory import peak_live_bytes
from deq_lm.solvers import Anderson, Broyden, Outcome, StoppingRule, solve
from deq_lm.solvers.broyden import MultisecantState, StepsState
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


@pytest.mark.parametrize("history_size", [1, 2, 5])
def test_the_prefix_form_satisfies_all_secant_equations_kept(history_size: int):
    """Were the residual a remembered difference of residuals, the step would be that pair's, reversed."""
    problem = linear("linear", 0.9, width=12)
    solver = Broyden(history_size=history_size, restart_growth=float("inf"), max_step=float("inf"))
    state = solver.init(problem.f, problem.z0)
    images: list[torch.Tensor] = []
    residuals: list[torch.Tensor] = []
    for _ in range(8):
        before, state = state, solver.step(problem.f, state, None)
        images.append(state.image - before.image)
        residuals.append(state.residual - before.residual)
    assert isinstance(state, MultisecantState)
    products = state.pairs.measure(state.residual, None)
    rows, image_rows = (torch.stack(kept[-history_size:], dim=-2) for kept in (residuals, images))  # (B, U, m, N)
    residual = state.residual[..., None]
    test_rows = 2 * rows - image_rows  # delta_residual - step
    torch.testing.assert_close(products.matrix, (test_rows @ rows.mT).cumsum(1), rtol=1e-9, atol=1e-12)
    projections = (test_rows @ residual).squeeze(-1).cumsum(1)
    torch.testing.assert_close(products.projections, projections, rtol=1e-9, atol=1e-12)
    for j in range(min(history_size, 8)):
        gamma = products.solve(products.matrix, products.matrix[..., j])
        expected = torch.zeros_like(gamma)
        expected[..., j] = 1.0
        torch.testing.assert_close(gamma, expected, rtol=0, atol=1e-6)


def test_a_step_is_no_longer_than_max_step_residuals():
    problem = linear("linear", 0.99, width=12)
    for max_step in (0.2, 0.5):
        solver = Broyden(max_step=max_step, restart_growth=float("inf"))
        state = solver.init(problem.f, problem.z0)
        lengths = []
        for _ in range(12):
            new = solver.step(problem.f, state, None)
            correction, residual = (
                (z.square().sum(-1).cumsum(1)).sqrt() for z in (new.point - state.image, state.residual)
            )
            lengths.append(correction / residual)
            state = new
        first = torch.stack(lengths)[..., 0]  # later positions add theirs, each shortened with its own prefix
        assert max_step * (1 - 1e-12) <= first.max() <= max_step * (1 + 1e-12)


@pytest.mark.parametrize("num_steps", [2, 4, 8, 11])
def test_first_method_satisfies_the_newest_secant_equation(num_steps: int):
    """H (change of the residual) = step, for the H written out as the product of its factors."""
    problem = linear("linear", 0.9)
    solver = Broyden(scope="sequence", history_size=6)
    state = before = solver.init(problem.f, problem.z0)
    for _ in range(num_steps):
        before, state = state, solver.step(problem.f, state, None)
    newest = state.point - before.point
    assert isinstance(state, StepsState)
    solver._first_step(state)  # the step that makes the newest factor
    steps = state.steps.rings[0][: len(state.steps), 0, 0]
    steps = steps.roll(-(state.steps.newest + 1), 0) if state.steps.is_full else steps
    inverse = -torch.eye(steps.shape[-1], dtype=steps.dtype)
    for step, following in itertools.pairwise(steps):
        inverse = inverse + torch.outer(following, step @ inverse) / step.square().sum()
    change = (state.residual - before.residual)[0].flatten()
    torch.testing.assert_close(inverse @ change, newest[0].flatten(), rtol=1e-6, atol=1e-9)


def test_the_rings_keep_the_newest_rows_in_order():
    history = SecantHistory(torch.zeros(1, 1, 2), capacity=3, num_rings=2, half_precision=False)
    for number in range(1, 6):
        first, second = history.advance()
        first.fill_(number)
        second.fill_(10 * number)
    assert len(history) == 3
    assert history.is_full
    assert history.oldest_first(history.rings[0][:, 0, 0, 0]).tolist() == [3.0, 4.0, 5.0]
    order = torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(history.oldest_first(history.slots(order)), order)
    assert history.products(1, torch.ones(1, 1, 2)).sort().values.tolist() == [[[60.0, 80.0, 100.0]]]
    history.clear()
    assert len(history) == 0


@pytest.mark.parametrize("scope", ["prefix", "sequence"])
@pytest.mark.parametrize("divergence_factor", [None, 1e4])
def test_limited_memory_never_blows_up_on_a_map_it_cannot_solve(scope, divergence_factor):
    problem = linear("hard", 1.5, length=6, width=6)
    solver = Broyden(scope=scope, history_size=3)
    rule = StoppingRule(max_steps=300, rtol=1e-12, patience=None, divergence_factor=divergence_factor)
    solution = solve(problem.f, problem.z0, solver=solver, stopping=rule)
    assert solution.z.isfinite().all()
    assert (solution.converged == (solution.relative_residual <= 1e-12)).all()
    assert (solution.used_fallback >= (solution.outcome >= Outcome.DIVERGED)).all()
    growth = solution.residual_norm / solution.trace.residual_norm[0]
    assert (growth <= (10.0 if scope == "prefix" else 1.0)).all()  # prefixes have their best states at different steps
    if scope == "prefix" and divergence_factor is None:
        assert solution.converged.all()  # it can, given 300 steps


def test_a_prefix_whose_residual_grows_forgets_its_pairs_and_the_others_keep_theirs():
    solver = Broyden(history_size=8)
    x = torch.linspace(0.2, 2, 24, dtype=torch.float64).view(1, 2, 12)
    calls = 0

    def f(z: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        image = 0.2 * z.tanh() + x
        if calls == 4:
            image[:, 1] += 100.0  # the second position's residual jumps once
        return image

    state = solver.init(f, 0 * x)
    for _ in range(3):
        state = solver.step(f, state, None)
    new = solver.step(f, state, None)
    assert torch.equal(new.point[:, 1], state.image[:, 1])  # a Picard step
    assert not torch.equal(new.point[:, 0], state.image[:, 0])
    usable = new.pairs.measure(new.residual, None).usable
    assert usable[0].tolist() == [[True] * 4, [False] * 3 + [True]]


@pytest.mark.parametrize(
    ("solver", "states"),
    [
        (Broyden(history_size=12, scope="sequence"), 12 + 6),
        (Broyden(history_size=12), 2 * 12 + 6),
        (Anderson(history_size=12), 2 * 12 + 6),
        (Anderson(history_size=12, scope="sequence"), 2 * 12 + 6),
        (Broyden(history_size=12, scope="sequence", half_precision_history=True), 6 + 6),
        (Broyden(history_size=12, half_precision_history=True), 12 + 8),
        (Anderson(history_size=12, half_precision_history=True), 12 + 8),
    ],
    ids=repr,
)
def test_memory_is_the_history_and_six_states_whatever_the_step_budget(solver, states: int):
    """All tensors of a solve that are alive at once; some units are frozen half-way, and the best states differ."""
    x = torch.randn(4, 32, 256, generator=torch.Generator().manual_seed(0))
    factors = torch.linspace(-1.05, 0.99, 256)

    def f(z: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(x, z, factors)

    z0 = torch.zeros_like(x)

    def peak(num_steps: int, rtol: float = 3e-2) -> float:
        rule = StoppingRule(max_steps=num_steps, rtol=rtol, patience=None)
        return peak_live_bytes(lambda: solve(f, z0, solver=solver, stopping=rule)) / x.nbytes

    assert peak(30) == peak(300)
    small_matrices = 0.3 if solver.scope == "sequence" else 1.0
    assert states - 2 < peak(30) <= states + small_matrices
    assert (
        peak(120, rtol=0.0) <= states + small_matrices
    )  # all steps taken: only the traces grow, by two numbers a step
