"""The problem suite says what is true of its problems: solutions, causality, where plain iteration converges."""

from __future__ import annotations

import pytest
import torch
from tiny_run import make_recipe

from deq_lm.regularizers import spectral_radius
from deq_lm.solvers import Broyden, Picard, StoppingRule, solve
from deq_lm.training import train


def test_known_solutions_are_solutions(problems):
    known = [problem for problem in problems.suite() if problem.z_star is not None]
    assert len(known) > 20
    for problem in known:
        torch.testing.assert_close(problem.f(problem.z_star), problem.z_star, rtol=0, atol=1e-9, msg=problem.name)


def test_names_are_unique_and_everything_is_float64_and_finite(problems):
    suite = problems.suite()
    assert len({problem.name for problem in suite}) == len(suite)
    for problem in suite:
        image = problem.f(problem.z0)
        assert image.shape == problem.z0.shape, problem.name
        assert image.dtype == torch.float64, problem.name
        assert image.isfinite().all(), problem.name


def test_the_same_seed_gives_the_same_problems(problems):
    for first, second in zip(problems.suite(quick=True), problems.suite(quick=True), strict=True):
        assert torch.equal(first.f(first.z0), second.f(second.z0)), first.name
    cells, others = (problems.cell_problems((0.1,), sizes=((16, 8),), seed=seed) for seed in (0, 1))
    assert not torch.equal(cells[0].f(cells[0].z0), others[0].f(others[0].z0))


def test_no_later_position_changes_an_earlier_one_of_a_causal_map(problems):
    for problem in problems.suite():
        length = problem.z0.shape[1]
        if not problem.causal or length == 1:
            continue
        changed = problem.z0.clone()
        changed[:, length // 2 :] += 0.1
        before, after = (problem.f(z)[:, : length // 2] for z in (problem.z0, changed))
        assert torch.equal(before, after), problem.name


def test_random_maps_have_the_radius_they_are_named_for(problems):
    for problem in problems.random_problems((0.5, 1.1), (0.0,), batch=2, length=3, width=8):
        radius = spectral_radius(problem.f, problem.z_star, num_iterations=400)
        expected = 0.5 if "radius=0.5" in problem.name else 1.1
        torch.testing.assert_close(radius, torch.full_like(radius, expected), rtol=0.03, atol=0, msg=problem.name)


def test_departure_from_normality_lets_errors_grow_before_they_fall(problems):
    growth = []
    for departure in (0.0, 2.0):
        affine = problems.random_problems((0.5,), (departure,), batch=2, length=4)[0]
        solution = solve(affine.f, affine.z0, solver=Picard(), stopping=StoppingRule.fixed(10))
        growth.append((solution.trace.residual_norm.amax(dim=0) / solution.trace.residual_norm[0]).max())
    assert growth[0] < 1.5
    assert growth[1] > 2.0


def test_classical_problems_are_solved_and_plain_iteration_converges_where_they_say(problems):
    for problem in problems.classical_problems(num_starts=1):
        rule = StoppingRule(max_steps=5000, rtol=1e-8, patience=None)
        assert solve(problem.f, problem.z0, solver=Picard(scope="sequence"), stopping=rule).converged.all(), (
            problem.name
        )
        rule = StoppingRule(max_steps=100, rtol=1e-8, patience=None)
        solution = solve(problem.f, problem.z0, solver=Broyden(scope="sequence"), stopping=rule)
        assert solution.converged.all(), problem.name
        if problem.z_star is not None:
            torch.testing.assert_close(solution.z, problem.z_star, rtol=0, atol=1e-4, msg=problem.name)


def test_the_chandrasekhar_equation_has_the_mass_that_theory_gives(problems):
    """Exactly, also after quadrature: mean(H) = 2 (1 - sqrt(1 - c)) / c."""
    for c in (0.5, 0.9):
        problem = next(each for each in problems.classical_problems(num_starts=1) if each.name == f"H-equation c={c}")
        rule = StoppingRule(max_steps=50, rtol=1e-13)
        z = solve(problem.f, problem.z0, solver=Broyden(scope="sequence"), stopping=rule).z
        assert z.mean().item() == pytest.approx(2 * (1 - (1 - c) ** 0.5) / c, rel=1e-10)


def test_a_trained_cell_is_a_problem_with_memory_from_the_segment_before(problems, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    recipe = make_recipe(tmp_path, "training.max_steps=2")
    assert train(recipe) is None
    folder = tmp_path / "run"
    first, second = problems.trained_problems(folder, batch=2, num_segments=2)
    assert first.z0.shape == (2, 8, 16)
    assert first.z0.dtype == torch.float32
    assert "memory_key" not in first.f.tensors
    assert second.f.tensors["memory_key"].shape[2] == 8
    assert first.f(first.z0).isfinite().all()
