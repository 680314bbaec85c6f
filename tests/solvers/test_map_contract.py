"""What f may do and may not, and in which precision it runs, for every solver."""

import pytest
import torch
from problems import tanh

from deq_lm.solvers import Anderson, Broyden, FixedPointSolver, Picard, Reversible, StoppingRule, solve

ALL = [solver(scope=scope) for solver in (Picard, Reversible, Anderson, Broyden) for scope in ("prefix", "sequence")]
every_solver = pytest.mark.parametrize("solver", ALL, ids=lambda solver: f"{type(solver).__name__}-{solver.scope}")


@every_solver
def test_under_autocast_f_runs_in_half_precision_and_the_solver_does_not(solver: FixedPointSolver):
    weight = 0.3 * torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(1))
    seen = set()

    def f(z: torch.Tensor) -> torch.Tensor:
        product = z @ weight
        seen.add(product.dtype)
        return product.float().tanh() + x  # rounded once, by the product alone

    rule = StoppingRule.fixed(8)
    plain = solve(lambda z: (z.bfloat16() @ weight.bfloat16()).float().tanh() + x, 0 * x, solver=solver, stopping=rule)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = solve(f, 0 * x, solver=solver, stopping=rule)
    assert seen == {torch.bfloat16}
    assert torch.equal(mixed.z, plain.z)


@every_solver
def test_a_half_precision_image_is_widened(solver: FixedPointSolver):
    solution = solve(lambda z: (0.5 * z + 1).bfloat16(), torch.zeros(2, 3, 4), solver=solver)
    assert solution.z.dtype == solution.image.dtype == torch.float32


@every_solver
@pytest.mark.parametrize("reuse", ["buffer", "argument"])
def test_a_map_that_writes_into_what_it_returned_or_was_given_is_refused(solver: FixedPointSolver, reuse: str):
    buffer = torch.empty(2, 3, 4)

    def f(z: torch.Tensor) -> torch.Tensor:
        return torch.add(0.5 * z, 1.0, out=buffer) if reuse == "buffer" else z.mul_(0.5).add_(1.0)

    with pytest.raises(ValueError, match="return a new tensor from every call"):
        solve(f, torch.zeros(2, 3, 4), solver=solver)


@every_solver
def test_a_map_that_changes_the_shape_is_refused(solver: FixedPointSolver):
    with pytest.raises(ValueError, match=r"\(2, 3, 4\) to \(2, 3, 1\)"):
        solve(lambda z: z.sum(-1, keepdim=True), torch.zeros(2, 3, 4), solver=solver)


@every_solver
def test_an_image_in_transposed_memory_is_solved_like_any_other(solver: FixedPointSolver):
    problem = tanh()
    rule = StoppingRule(max_steps=9, rtol=1e-12)
    plain = solve(problem.f, problem.z0, solver=solver, stopping=rule)
    strided = solve(lambda z: problem.f(z).mT.contiguous().mT, problem.z0, solver=solver, stopping=rule)
    torch.testing.assert_close(strided.z, plain.z, rtol=0, atol=1e-12)
