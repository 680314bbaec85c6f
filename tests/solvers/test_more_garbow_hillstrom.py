"""The systems of Moré, Garbow and Hillstrom from near and far: what is not solved is said to be not solved.

Each F(z) = 0 is put as z = z - F(z), as it stands: without a step of its own most of these maps expand, some enormously,
and no fixed-point solver solves many. What counts here is that none of them takes an end for a solution.

References:
    Moré, Garbow, Hillstrom 1981, "Testing unconstrained optimization software", ACM TOMS 7(1); numbers are theirs. Where
    they have more equations than variables (Watson), F is the gradient of half the sum of squares, as in MINPACK.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deq_lm.solvers import Anderson, Broyden, FixedPointSolver, Picard, Reversible, StoppingRule, solve

System = Callable[[Tensor], Tensor]  # of (N,)
N = 10
INDEX = torch.arange(1, N + 1, dtype=torch.float64)
GRID = INDEX / (N + 1)
ONES = torch.ones(N, dtype=torch.float64)


def neighbours(z: Tensor, before: int, after: int) -> Tensor:
    """Of each variable, the sum of z (1 + z) over so many before and after it."""
    values = z * (1 + z)
    return torch.stack([values[max(0, i - before) : i + after + 1].sum() - values[i] for i in range(len(z))])


def powell_singular(z: Tensor) -> Tensor:
    a, b, c, d = z
    return torch.stack([a + 10 * b, 5**0.5 * (c - d), (b - 2 * c) ** 2, 10**0.5 * (a - d) ** 2])


def wood(z: Tensor) -> Tensor:
    a, b, c, d = z
    return torch.stack(
        [
            -200 * a * (b - a**2) - (1 - a),
            200 * (b - a**2) + 20.2 * (b - 1) + 19.8 * (d - 1),
            -180 * c * (d - c**2) - (1 - c),
            180 * (d - c**2) + 20.2 * (d - 1) + 19.8 * (b - 1),
        ]
    )


def helical_valley(z: Tensor) -> Tensor:
    turns = torch.atan2(z[1], z[0]) / (2 * math.pi)
    turns = torch.where(turns < -0.25, turns + 1, turns)  # from -1/4 to 3/4
    return torch.stack([10 * (z[2] - 10 * turns), 10 * (z[:2].norm() - 1), z[2]])


def watson(z: Tensor) -> Tensor:
    power = torch.arange(len(z), dtype=torch.float64)
    t = torch.arange(1, 30, dtype=torch.float64)[:, None] / 29
    value, slope = t**power, power * t ** (power - 1).clamp(min=0)
    residual = torch.cat([slope @ z - (value @ z) ** 2 - 1, z[:1], z[1:2] - z[:1] ** 2 - 1])
    jacobian = torch.cat([slope - 2 * (value @ z)[:, None] * value, torch.zeros(2, len(z), dtype=torch.float64)])
    jacobian[29, 0], jacobian[30, 0], jacobian[30, 1] = 1.0, -2 * z[0], 1.0
    return jacobian.T @ residual


def chebyquad(z: Tensor) -> Tensor:
    polynomials = [torch.ones_like(z), 2 * z - 1]
    for _ in z[1:]:
        polynomials.append(2 * (2 * z - 1) * polynomials[-1] - polynomials[-2])
    means = torch.stack([values.mean() for values in polynomials[1:]])
    order = torch.arange(1, len(z) + 1, dtype=torch.float64)
    return means + torch.where(order % 2 == 0, 1 / (order**2 - 1).clamp(min=1), 0.0)


def brown_almost_linear(z: Tensor) -> Tensor:
    return torch.cat([z[:-1] + z.sum() - (N + 1), z.prod()[None] - 1])


def boundary_value(z: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(z, (1, 1))
    return 2 * z - padded[:-2] - padded[2:] + (z + GRID + 1) ** 3 / (2 * (N + 1) ** 2)


def integral_equation(z: Tensor) -> Tensor:
    kernel = torch.minimum(GRID[:, None] * (1 - GRID), GRID * (1 - GRID[:, None]))
    return z + kernel @ (z + GRID + 1) ** 3 / (2 * (N + 1))


def variably_dimensioned(z: Tensor) -> Tensor:
    total = (INDEX * (z - 1)).sum()
    return z - 1 + INDEX * total * (1 + 2 * total**2)


def tridiagonal(z: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(z, (1, 1))
    return (3 - 2 * z) * z - padded[:-2] - 2 * padded[2:] + 1


SYSTEMS: dict[str, tuple[System, list[float] | Tensor]] = {
    "1 Rosenbrock": (lambda z: torch.stack([1 - z[0], 10 * (z[1] - z[0] ** 2)]), [-1.2, 1.0]),
    "13 Powell singular": (powell_singular, [3.0, -1.0, 0.0, 1.0]),
    "3 Powell badly scaled": (
        lambda z: torch.stack([1e4 * z[0] * z[1] - 1, (-z[0]).exp() + (-z[1]).exp() - 1.0001]),
        [0.0, 1.0],
    ),
    "14 Wood": (wood, [-3.0, -1.0, -3.0, -1.0]),
    "7 helical valley": (helical_valley, [-1.0, 0.0, 0.0]),
    "20 Watson": (watson, [0.0] * 6),
    "35 Chebyquad": (chebyquad, [i / 8 for i in range(1, 8)]),
    "27 Brown almost-linear": (brown_almost_linear, 0.5 * ONES),
    "28 discrete boundary value": (boundary_value, GRID * (GRID - 1)),
    "29 discrete integral equation": (integral_equation, GRID * (GRID - 1)),
    "26 trigonometric": (lambda z: N - z.cos().sum() + INDEX * (1 - z.cos()) - z.sin(), ONES / N),
    "25 variably dimensioned": (variably_dimensioned, 1 - INDEX / N),
    "30 Broyden tridiagonal": (tridiagonal, -ONES),
    "31 Broyden banded": (lambda z: z * (2 + 5 * z**2) + 1 - neighbours(z, 5, 1), -ONES),
}


def maps() -> list[tuple[str, System, Tensor]]:
    """Each system from 1, 10 and 100 times its published start, (3, 1, N): one position, so that both scopes agree."""
    made = []
    for name, (system, start) in SYSTEMS.items():
        z = torch.as_tensor(start, dtype=torch.float64)
        far = z if z.any() else torch.ones_like(z)  # a start at zero has no multiples
        made.append((name, system, torch.stack([z, 10 * far, 100 * far])[:, None]))
    return made


@pytest.mark.parametrize(
    ("solver", "num_solved"),
    [
        (Picard(), 2),
        (Reversible(), 2),
        (Anderson(), 12),
        (Anderson(scope="sequence"), 12),
        (Anderson(relaxation=0.5), 14),
        (Broyden(), 6),
        (Broyden(scope="sequence"), 6),
    ],
    ids=str,
)
def test_of_42_hard_systems_none_is_said_to_be_solved_that_is_not(solver: FixedPointSolver, num_solved: int):
    """MINPACK solves 35 of the 42 and takes no end for a solution."""
    rule = StoppingRule(max_steps=500, rtol=1e-6, atol=1e-6, patience=100)
    solved = 0
    for name, system, z0 in maps():

        def f(z: Tensor, system: System = system) -> Tensor:
            return torch.stack([(one - system(one.flatten())).view_as(one) for one in z])

        solution = solve(f, z0, solver=solver, stopping=rule)
        assert solution.z.isfinite().all(), name
        size = torch.stack([system(one.flatten()).norm() for one in solution.z])
        assert (size[solution.converged] < 1e-4).all(), name
        solved += int(solution.converged.sum())
    assert solved >= num_solved
