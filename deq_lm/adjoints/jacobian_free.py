"""Jacobian-free backpropagation: one recorded evaluation at z*, (I - J)^-1 taken as I."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from deq_lm.adjoints.base import Adjoint, DifferentiableMap, Solve
from deq_lm.solvers import Solution


@dataclass(frozen=True, kw_only=True)
class JacobianFree(Adjoint):
    """Backpropagate through f(z*) with z* held constant: the cheapest gradient, a descent direction for contractions.

    References:
        Fung, Heaton, Li, McKenzie, Osher, Yin 2022, "JFB: Jacobian-free backpropagation for implicit networks".
    """

    def apply(
        self,
        f: DifferentiableMap,
        z0: Tensor,
        solve: Solve,
        *,
        report: Callable[[Solution], None] | None = None,
    ) -> tuple[Tensor, Solution]:
        solution = solve(f, z0)
        return f(solution.z), solution
