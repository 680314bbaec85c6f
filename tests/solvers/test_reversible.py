"""What is particular to the reversible iteration; test_contract.py has what it shares with every solver."""

import pytest
import torch
from problems import rotation, tanh

from deq_lm.solvers import Picard, Reversible, StoppingRule, solve


@pytest.mark.parametrize("relaxation", [0.3, 0.5, 0.8])
def test_two_steps_are_one_of_the_published_pair(relaxation: float):
    problem = tanh()
    y = z = problem.z0
    for num_pairs in range(1, 8):
        y = (1 - relaxation) * y + relaxation * problem.f(z)
        z = (1 - relaxation) * z + relaxation * problem.f(y)
        for num_steps, expected in [(2 * num_pairs - 1, y), (2 * num_pairs, z)]:
            rule = StoppingRule.fixed(num_steps)
            solution = solve(
                problem.f, problem.z0, solver=Reversible(relaxation=relaxation), stopping=rule, differentiable=True
            )
            torch.testing.assert_close(solution.z, expected, rtol=0, atol=1e-12)


def test_it_solves_the_rotation_that_picard_spirals_out_of():
    problem = rotation()
    rule = StoppingRule(max_steps=100, rtol=1e-10)
    assert not solve(problem.f, problem.z0, solver=Picard(), stopping=rule).converged.any()
    solution = solve(problem.f, problem.z0, solver=Reversible(), stopping=rule)
    assert solution.converged.all()
    torch.testing.assert_close(solution.z, problem.z_star, rtol=0, atol=1e-8)


def test_what_the_way_back_needs_is_kept_only_where_steps_are_recorded():
    problem = tanh()
    rule = StoppingRule.fixed(50)
    assert solve(problem.f, problem.z0, solver=Reversible(), stopping=rule).trail is None
    assert solve(problem.f, problem.z0, solver=Picard(), stopping=rule, differentiable=True).trail is None
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        state = Reversible().init(problem.f, problem.z0)
        assert Reversible().step(problem.f, state, None).words == ()
    trail = solve(
        lambda z: weight * problem.f(z), problem.z0, solver=Reversible(), stopping=rule, differentiable=True
    ).trail
    assert trail.num_steps == 50
    assert len(trail.words) == 3  # 22 digits each
    assert not any(
        value.requires_grad for value in (trail.point, trail.image, trail.residual, trail.latest, trail.previous)
    )
