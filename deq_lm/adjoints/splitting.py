"""The adjoint equation of f(z) = prox_h(W z + u) as a splitting solves it: as a proximal map again.

J = D W at z*, with D the slopes of the activation. u = J^T u + g, g = dL/dz*, reads u = W^T v + g with v = D u, and

    v = D (W^T v + g),

whose right-hand side is prox of a quadratic, at an affine map with the margin and norm of W: the splittings' rates hold as
in the forward solve, whatever D, zeros included.

References:
    Winston, Kolter 2020, "Monotone operator equilibrium networks", theorem 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deq_lm._types import FixedPointMap
from deq_lm.solvers import FixedPointSolver, Solution, StoppingRule, proximal_form, solve


def splitting_adjoint(
    f: FixedPointMap, z: Tensor, cotangent: Tensor, solver: FixedPointSolver, stopping: StoppingRule
) -> tuple[Tensor, Solution]:
    """u with u = J^T u + cotangent, (B, L, D), and the facts of the solve for v.

    Args:
        f: a map with a proximal form.
        z: its fixed point.
        cotangent: g.
        solver: an operator splitting.
        stopping: judges v, as always by ||D (W^T v + g) - v||.
    """
    form = proximal_form(f).adjoint_form(z, cotangent)  # in reversed time, so that W^T is causal
    start = form.prox(cotangent.flip(1), 1.0)
    solution = solve(form, start, solver=solver, stopping=stopping)
    with torch.no_grad():
        u = form.affine(solution.z).flip(1)
    return u, solution.reversed_in_time()
