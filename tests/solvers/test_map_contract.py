"""What f may do and may not, and in which precision it runs, for every solver."""

from dataclasses import dataclass

import pytest
import torch
from problems import tanh

from deq_lm.autocast import Autocast, KnownPrecision
from deq_lm.solvers import Anderson, Broyden, FixedPointSolver, Outcome, Picard, Reversible, StoppingRule, solve
from deq_lm.solvers.map_contract import CheckedMap, spacing_of
from deq_lm.solvers.norms import spacing

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


def test_the_precision_of_an_f_that_says_nothing_is_that_of_its_image_and_before_there_is_one_that_of_the_state():
    checked = CheckedMap(lambda z: z.bfloat16(), "cpu")
    assert checked.spacing(torch.float32) == spacing(torch.float32)
    checked(torch.ones(1, 2, 3))
    assert checked.spacing(torch.float32) == spacing(torch.bfloat16)


@dataclass
class SaysSo(KnownPrecision):
    dtype: torch.dtype
    autocast: Autocast

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        return 0.5 * z + 1


class ByChance(torch.nn.Identity):
    """A user's module, with attributes that mean something else."""

    dtype, autocast, spacing = torch.bfloat16, "tomorrow", 1e9


@pytest.mark.parametrize("known", [True, False])
def test_what_f_computes_in_is_read_where_f_is_meant_to_say_it_and_no_attribute_is_by_chance(known: bool):
    off = Autocast("cpu", enabled=False, dtype=torch.bfloat16)
    f = SaysSo(torch.bfloat16, off) if known else ByChance()
    checked = CheckedMap(f, "cpu")
    assert checked.spacing(torch.float32) == spacing(torch.bfloat16 if known else torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        f = SaysSo(torch.float32, off) if known else f
        assert spacing_of(f, torch.float32, Autocast.current("cpu")) == spacing(
            torch.float32 if known else torch.bfloat16
        )


@pytest.mark.parametrize(("given", "outcome"), [(None, "CONVERGED"), (1e-9, "CONVERGED"), (2.0**-7, "STALLED")])
def test_who_knows_more_of_the_precision_of_f_says_it_to_solve(given: float | None, outcome: str):
    rule = StoppingRule(max_steps=600, rtol=1e-3, patience=600)
    solution = solve(lambda z: 0.95 * z + 1, torch.zeros(1, 4, 3), solver=Picard(), stopping=rule, spacing=given)
    assert solution.outcome.item() == Outcome[outcome]
    checked = CheckedMap(lambda z: z, "cpu", spacing=given)
    assert checked.spacing(torch.float32) == max(given or 0.0, spacing(torch.float32))
