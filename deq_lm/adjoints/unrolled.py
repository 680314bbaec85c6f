"""Backpropagate through the solver's own steps: a weight-tied network as deep as the solve is long."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from deq_lm.adjoints.base import Adjoint, DifferentiableMap, Solve
from deq_lm.solvers import FixedPointSolver, Solution


@dataclass(frozen=True, kw_only=True)
class Unrolled(Adjoint):
    """Record every step. Memory grows with their number; the gradient is of what was computed, not of the equilibrium.

    Only solvers without coefficients (Picard) can be unrolled: a model trained through the steps of a solver whose
    coefficients see the whole sequence learns to read the future in them.
    """

    def check(self, solver: FixedPointSolver) -> None:
        if not solver.differentiable:
            raise ValueError(
                f"unrolled with the solver {type(solver).__name__}, whose steps are not recorded for a gradient: expected "
                "a solver without coefficients. Use Picard, or another adjoint."
            )

    def apply(
        self,
        f: DifferentiableMap,
        z0: Tensor,
        solve: Solve,
        *,
        report: Callable[[Solution], None] | None = None,
    ) -> tuple[Tensor, Solution]:
        solution = solve(f, z0, differentiable=True)
        return solution.image, replace(solution, z=solution.z.detach(), image=solution.image.detach())
