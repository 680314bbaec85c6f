"""Gradient by the implicit function theorem: solve u = J^T u + dL/dz*, then dL/dtheta = u^T df/dtheta, J = df/dz at z*.

Nothing of the forward solve is kept but z*: the graph of the one differentiated evaluation is built in the backward pass,
from copies of the inputs, under the autocast state and with the dropout mask that f was bound with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deq_lm.adjoints.base import Adjoint, DifferentiableMap, Solve
from deq_lm.adjoints.splitting import splitting_adjoint
from deq_lm.autocast import Autocast
from deq_lm.solvers import Broyden, FixedPointSolver, Solution, StoppingRule, solve
from deq_lm.solvers.map_contract import spacing_of

ADJOINT_FLOOR = 0.25
"""Spacings of f's numbers at which the residual of the adjoint equation is assumed to be noise, where that of f itself is
at about one: the cotangent is exact, and a product with J^T rounds less than f, with its norms and activations, does.

Chosen on Transformer-XL cells with random weights (of standard deviation 0.04 to 0.12, 30 sequences each) in bfloat16.
There the residual of Broyden's and Anderson's solves, once it falls no more, has medians of 0.07 to 0.23 spacings; its
least is below a quarter in 73 to 93 % of the sequences, and never comes near in 7 to 17 %. Of trained cells nothing is
known. A solve goes below it for as long as it halves its residual in four steps."""


@dataclass(frozen=True, kw_only=True)
class Implicit(Adjoint):
    """The exact gradient of the equilibrium, up to the residuals of both solves.

    Attributes:
        solver: solves the (linear) adjoint equation. Coefficients that look at the whole sequence leak nothing into a
            probability here, and need the least memory. J^T carries influence from later to earlier positions, so a prefix
            scope is applied to reversed time: inner products at t run over positions >= t. An operator splitting, for a
            monotone cell, solves an equivalent equation (`deq_lm.adjoints.splitting`).
        stopping: its own rule. Only relative tolerances make sense here, gradients have no natural size.

    References:
        Bai, Kolter, Koltun 2019, "Deep equilibrium models", theorem 1.
    """

    solver: FixedPointSolver = field(
        default_factory=lambda: Broyden(scope="sequence", history_size=12, half_precision_history=True)
    )
    stopping: StoppingRule = field(default_factory=StoppingRule)

    def apply(
        self,
        f: DifferentiableMap,
        z0: Tensor,
        solve: Solve,
        *,
        report: Callable[[Solution], None] | None = None,
    ) -> tuple[Tensor, Solution]:
        solution = solve(f, z0)
        return _ImplicitGradient.apply(f, solution, self, report, *f.inputs), solution

    def adjoint_solve(
        self, f: DifferentiableMap, image: Tensor, z: Tensor, cotangent: Tensor
    ) -> tuple[Tensor, Solution]:
        """u with u = J^T u + cotangent, all (B, L, D), and the facts of its solve; `image` = f(z) is recorded."""
        if self.solver.needs_proximal_form:
            return splitting_adjoint(f, z, cotangent, self.solver, self.stopping)
        backwards_in_time = self.solver.scope == "prefix"

        def in_its_time(u: Tensor) -> Tensor:
            return u.flip(1) if backwards_in_time else u

        def transposed(u: Tensor) -> Tensor:
            (product,) = torch.autograd.grad(
                image, z, in_its_time(u), retain_graph=True, allow_unused=True, materialize_grads=True
            )
            return in_its_time(product + cotangent)

        solution = solve(
            transposed,
            in_its_time(cotangent),
            solver=self.solver,
            stopping=self.stopping,
            spacing=ADJOINT_FLOOR * spacing_of(f, image.dtype, Autocast.current(z.device.type)),
        )
        if backwards_in_time:
            solution = solution.reversed_in_time()
        return solution.z, solution


class _ImplicitGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        f: DifferentiableMap,
        solution: Solution,
        adjoint: Implicit,
        report: Callable[[Solution], None] | None,
        *inputs: Tensor,
    ) -> Tensor:
        ctx.f, ctx.adjoint, ctx.report = f, adjoint, report
        ctx.save_for_backward(solution.z, *inputs)
        return solution.image.detach()  # a new tensor object: the Solution stays outside the graph

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (cotangent,) = grad_outputs
        z, *inputs = ctx.saved_tensors
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            leaves = [tensor.detach().requires_grad_() for tensor in inputs]
            f = ctx.f.with_inputs(leaves)
            image = f(z)
        # A power of two takes the size of the loss out of the solve without touching a digit.
        exponent = torch.frexp(cotangent.abs().amax(dim=tuple(range(1, cotangent.dim())), keepdim=True)).exponent
        unit_cotangent = torch.ldexp(cotangent, -exponent)
        if torch.isfinite(unit_cotangent).all():
            u, solution = ctx.adjoint.adjoint_solve(f, image, z, unit_cotangent)
            if ctx.report is not None:
                ctx.report(solution)
            u = torch.ldexp(u, exponent)
        else:  # a broken loss: let it through for the training loop to see
            u = cotangent
        return (None, None, None, None, *_gradients(image, leaves, u))


def _gradients(image: Tensor, leaves: Sequence[Tensor], u: Tensor) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(image, leaves, u, allow_unused=True) if leaves else ()
