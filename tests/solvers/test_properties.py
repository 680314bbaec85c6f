"""What holds for every solver, scope and precision on any contraction, whatever its size."""

from __future__ import annotations

import pytest
import torch
from contractions import Contraction, contractions
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deq_lm.solvers import Anderson, Broyden, FixedPointSolver, Picard, Reversible, StoppingRule, solve

SOLVERS = [
    solver(scope=scope) for solver in (Picard, Reversible, Anderson, Broyden) for scope in ("prefix", "sequence")
]

# Fixed examples: a run either passes everywhere and always, or fails.
few = settings(deadline=None, derandomize=True, max_examples=7)
every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: f"{type(s).__name__}-{s.scope}")
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
tolerances = st.sampled_from([0.0, 1e-1, 1e-2, 1e-4])
budgets = st.integers(0, 14)


def relaxed_too(solver: FixedPointSolver) -> list[FixedPointSolver]:
    """The solver, and its variants with a smaller memory or a smaller step."""
    if isinstance(solver, Picard):
        return [solver, Picard(relaxation=0.6, scope=solver.scope)]
    if isinstance(solver, Reversible):
        return [solver, Reversible(relaxation=0.5, scope=solver.scope)]
    if isinstance(solver, Anderson):
        return [solver, Anderson(history_size=2, relaxation=0.8, scope=solver.scope)]
    return [solver, Broyden(history_size=3, scope=solver.scope)]


def prefix_norms(z: Tensor) -> Tensor:
    """Of every prefix, (B, L)."""
    return z.double().square().sum(dim=-1).cumsum(dim=1).sqrt()


@every_dtype
@every_solver
@few
@given(f=contractions("affine"), variant=st.integers(0, 1))
def test_an_affine_contraction_is_solved_as_well_as_its_residual_says(
    solver: FixedPointSolver, dtype: torch.dtype, f: Contraction, variant: int
):
    """||z - z*|| <= ||f(z) - z|| / (1 - norm), with z* from elimination."""
    f = f.to(dtype)
    rtol = 1e-10 if dtype == torch.float64 else 1e-5
    rule = StoppingRule(max_steps=1500, rtol=rtol, patience=300)
    solution = solve(f, f.z0, solver=relaxed_too(solver)[variant], stopping=rule)
    assert solution.converged.all()
    assert solution.z.dtype == dtype
    error = (solution.z - f.z_star).flatten(1).norm(dim=1)
    size = solution.image.double().flatten(1).norm(dim=1)
    rounded = 50 * torch.finfo(dtype).eps * size
    assert (error <= (solution.residual_norm + rounded) / (1 - f.norm)).all()
    assert (error <= 2 * (rtol * size + rounded) / (1 - f.norm)).all()


@every_dtype
@every_solver
@few
@given(f=contractions(), max_steps=budgets, rtol=tolerances)
def test_the_reported_residual_is_that_of_the_returned_state(
    solver: FixedPointSolver, dtype: torch.dtype, f: Contraction, max_steps: int, rtol: float
):
    f = f.to(dtype)
    solution = solve(f, f.z0, solver=solver, stopping=StoppingRule(max_steps=max_steps, rtol=rtol))
    image, eps = f(solution.z), torch.finfo(dtype).eps
    # The image of a position that has stopped is kept, and those before it had stopped: so not even its rounding changes.
    assert torch.equal(solution.image, image)
    norm = (image - solution.z).double().flatten(1).norm(dim=1)
    torch.testing.assert_close(solution.residual_norm.double(), norm, rtol=50 * eps, atol=0)
    expected = torch.where(norm == 0, 0.0, norm / image.double().flatten(1).norm(dim=1))
    torch.testing.assert_close(solution.relative_residual.double(), expected, rtol=50 * eps, atol=0)


@every_dtype
@every_solver
@few
@given(f=contractions(), max_steps=budgets, rtol=tolerances, order=st.permutations(range(4)))
def test_permuting_the_batch_permutes_the_results(
    solver: FixedPointSolver, dtype: torch.dtype, f: Contraction, max_steps: int, rtol: float, order: list[int]
):
    f = f.to(dtype)
    rule = StoppingRule(max_steps=max_steps, rtol=rtol)
    entries = torch.tensor([entry for entry in order if entry < len(f.x)])
    plain = solve(f, f.z0, solver=solver, stopping=rule)
    permuted = solve(f.of_batch(entries), f.z0, solver=solver, stopping=rule)
    # To rounding and not to the bit: a BLAS may round by how an entry happens to be aligned in memory.
    rounded = 1e-3 if dtype == torch.float32 else 1e-9
    for fact in ("z", "image"):
        found, wanted = getattr(permuted, fact), getattr(plain, fact)[entries]
        torch.testing.assert_close(found, wanted, rtol=0, atol=rounded * plain.image.abs().max().item())
    if dtype == torch.float64 and rtol > 0.0:  # where no count hangs on the last digit
        for fact in ("position_num_steps", "num_steps", "num_evaluations", "outcome"):
            assert torch.equal(getattr(permuted, fact), getattr(plain, fact)[entries]), fact


@every_dtype
@every_solver
@few
@given(f=contractions(), batch=st.integers(1, 4), max_steps=budgets, rtol=tolerances)
def test_counts_are_exact_for_every_sequence_when_all_run_alike(
    solver: FixedPointSolver, dtype: torch.dtype, f: Contraction, batch: int, max_steps: int, rtol: float
):
    f = f.to(dtype).of_batch(torch.zeros(batch, dtype=torch.long))
    calls = 0

    def counted(z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return f(z)

    rule = StoppingRule(max_steps=max_steps, rtol=rtol)
    solution = solve(counted, f.z0, solver=solver, stopping=rule, fallback=None)
    assert solution.num_evaluations.tolist() == [calls] * batch
    returned_to_best = calls - 1 - solution.num_steps  # one evaluation more, at the best state of an unsolved sequence
    assert returned_to_best.unique().tolist() in ([[0]] if solver.scope == "prefix" else [[0], [1]])
    assert (solution.num_steps <= max_steps).all()
    assert torch.equal(solution.position_num_steps.amax(dim=1), solution.num_steps)
    assert len(solution.trace.residual_norm) == solution.num_steps[0] + 1


@every_dtype
@every_solver
@few
@given(f=contractions(), max_steps=st.integers(0, 60), rtol=st.sampled_from([1e-1, 1e-2, 1e-4]))
def test_what_is_called_converged_satisfies_the_tolerance(
    solver: FixedPointSolver, dtype: torch.dtype, f: Contraction, max_steps: int, rtol: float
):
    """Every prefix of it does, under the prefix scope, and what is not called converged does not."""
    f = f.to(dtype)
    solution = solve(f, f.z0, solver=solver, stopping=StoppingRule(max_steps=max_steps, rtol=rtol))
    relative = prefix_norms(solution.image - solution.z) / prefix_norms(solution.image)
    judged = relative if solver.scope == "prefix" else relative[:, -1:]
    rounded = 1e-5 if dtype == torch.float32 else 1e-12
    assert (judged[solution.converged] <= rtol * (1 + rounded)).all()
    assert (judged[~solution.converged].amax(dim=1) > rtol * (1 - rounded)).all()


@every_dtype
@pytest.mark.parametrize("solver", SOLVERS[::2], ids=lambda s: type(s).__name__)
@few
@given(f=contractions(min_length=2), max_steps=budgets, rtol=tolerances, length=st.integers(1, 4))
def test_under_the_prefix_scope_a_truncated_sequence_has_the_results_of_the_prefix(
    solver: FixedPointSolver, dtype: torch.dtype, f: Contraction, max_steps: int, rtol: float, length: int
):
    """To the last bit: this f computes a prefix alike at any length, and sums over positions run from first to last."""
    f, length = f.to(dtype), min(length, f.x.shape[1] - 1)
    rule = StoppingRule(max_steps=max_steps, rtol=rtol)
    whole = solve(f, f.z0, solver=solver, stopping=rule)
    prefix = f.of_prefix(length)
    truncated = solve(prefix, prefix.z0, solver=solver, stopping=rule)
    assert not whole.used_fallback.any()
    for fact in ("z", "image", "position_num_steps"):
        assert torch.equal(getattr(truncated, fact), getattr(whole, fact)[:, :length]), fact


@every_dtype
@every_solver
@few
@given(f=contractions(), max_steps=budgets, rtol=tolerances, exponent=st.integers(-30, 30))
def test_scaling_by_a_power_of_two_scales_every_bit(
    solver: FixedPointSolver, dtype: torch.dtype, f: Contraction, max_steps: int, rtol: float, exponent: int
):
    f, scale = f.to(dtype), 2.0**exponent
    rule = StoppingRule(max_steps=max_steps, rtol=rtol)
    plain = solve(f, f.z0, solver=solver, stopping=rule)
    scaled = solve(lambda z: f(z / scale) * scale, f.z0, solver=solver, stopping=rule)
    for fact in ("z", "image", "residual_norm"):
        assert torch.equal(getattr(scaled, fact), getattr(plain, fact) * scale), fact
    for fact in ("outcome", "num_steps", "num_evaluations", "position_num_steps"):
        assert torch.equal(getattr(scaled, fact), getattr(plain, fact)), fact


@every_solver
@pytest.mark.parametrize("rtol", [1e-2, 1e-4])
def test_of_a_hundred_maps_of_any_strength_what_is_reported_is_so_in_double_precision(
    solver: FixedPointSolver, rtol: float
):
    """Each sequence has weights of its own, from weak to far too strong, half of them without a bound on the values."""
    generator = torch.Generator().manual_seed(SOLVERS.index(solver))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    strength = torch.logspace(-1, 0.5, 100)[:, None, None]
    own, past, x = strength * normal(100, 5, 5), strength * normal(100, 5, 5), normal(100, 6, 5)
    bounded = (torch.arange(100) % 2 == 0)[:, None, None]

    def f(z: Tensor) -> Tensor:
        means = z.cumsum(dim=1) / torch.arange(1, 7)[:, None]
        image = 0.3 * (z @ own.to(z) + means @ past.to(z)) + x.to(z)
        return torch.where(bounded, image.tanh(), image)

    solution = solve(f, torch.zeros_like(x), solver=solver, stopping=StoppingRule(max_steps=40, rtol=rtol))
    z = solution.z.double()
    image = f(z)
    relative = (image - z).flatten(1).norm(dim=1) / image.flatten(1).norm(dim=1)
    assert z.isfinite().all()
    assert (relative[solution.converged] <= 1.05 * rtol).all()
    torch.testing.assert_close(solution.relative_residual.double(), relative, rtol=0.1, atol=0)
    assert 10 < solution.converged.sum() < 100
