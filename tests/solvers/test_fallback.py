"""Going on after a breakdown: from the best state, within the budget, and without a look at the future."""

import pytest
import torch
from problems import Problem, linear

from deq_lm.solvers import Anderson, Broyden, FixedPointSolver, Outcome, StoppingRule, solve

ALL = [solver(scope=scope) for solver in (Anderson, Broyden) for scope in ("prefix", "sequence")]
every_solver = pytest.mark.parametrize("solver", ALL, ids=lambda solver: f"{type(solver).__name__}-{solver.scope}")


class BrokenOnce:
    """The map of a problem whose first sequence is NaN at one call."""

    def __init__(self, problem: Problem, call: int) -> None:
        self.problem, self.call, self.calls = problem, call, 0

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        image = self.problem.f(z)
        if self.calls == self.call:
            image[0] = float("nan")
        return image


@every_solver
def test_after_a_breakdown_the_fallback_goes_on_from_the_best_state_and_is_reported(solver: FixedPointSolver):
    problem = linear("linear", 0.5)
    rule = StoppingRule(max_steps=200, rtol=1e-8)
    solution = solve(BrokenOnce(problem, 5), problem.z0, solver=solver, stopping=rule)
    assert solution.used_fallback.tolist() == [True, False, False]
    assert solution.converged.all()
    torch.testing.assert_close(solution.z, problem.z_star, rtol=0, atol=1e-6)
    undisturbed = solve(problem.f, problem.z0, solver=solver, stopping=rule)
    assert torch.equal(solution.z[1:], undisturbed.z[1:])
    assert torch.equal(solution.num_evaluations[1:], undisturbed.num_evaluations[1:])


@every_solver
def test_the_fallback_has_the_steps_that_are_left(solver: FixedPointSolver):
    problem = linear("linear", 0.5)
    for max_steps in (4, 5, 9):
        f = BrokenOnce(problem, 5)
        rule = StoppingRule(max_steps=max_steps, rtol=1e-12)
        solution = solve(f, problem.z0[:1], solver=solver, stopping=rule)
        assert solution.used_fallback.all()
        assert solution.outcome.tolist() == [Outcome.MAX_STEPS] * 1 if max_steps > 4 else [Outcome.NON_FINITE]
        assert solution.num_steps.tolist() == [max_steps]
        assert solution.num_evaluations.tolist() == [f.calls] == [max_steps + 2]  # the start, and the best state again


@pytest.mark.parametrize("divergence_factor", [1.3, 1e4])
@pytest.mark.parametrize("solver", [Anderson(), Broyden()], ids=lambda solver: type(solver).__name__)
def test_a_fallback_does_not_see_the_future(solver: FixedPointSolver, divergence_factor: float):
    """Maps that make prefixes diverge, at steps of their own; position by position, so that f itself cannot leak."""
    rule = StoppingRule(max_steps=20, rtol=1e-6, divergence_factor=divergence_factor)
    num_fallbacks = 0
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        first = torch.randn(1, 4, 3, dtype=torch.float64, generator=generator)
        second = first.clone()
        second[:, 2:] = 3 * torch.randn(1, 2, 3, dtype=torch.float64, generator=generator)

        def run(x: torch.Tensor):
            def f(z: torch.Tensor) -> torch.Tensor:
                shifted = z.roll(1, dims=-1)
                if divergence_factor < 10:
                    return x + 2 * torch.tanh(4 * shifted - 2 * z)
                return x + 0.3 * z - 1.5 * shifted.square()

            return solve(f, 0 * x, solver=solver, stopping=rule)

        solutions = [run(first), run(second)]
        num_fallbacks += sum(int(solution.used_fallback.sum()) for solution in solutions)
        for fact in ("z", "image", "position_num_steps"):
            past = [getattr(solution, fact)[:, :2] for solution in solutions]
            assert torch.equal(*past), (seed, fact)
        assert all((solution.num_steps <= rule.max_steps).all() for solution in solutions)
    assert num_fallbacks > 20
