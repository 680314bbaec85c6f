"""Anderson acceleration (type II): the combination of recent steps that minimizes the linearized residual."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deq_lm._types import FixedPointMap, Scope
from deq_lm.solvers.base import FixedPointSolver, SolverState, evaluate
from deq_lm.solvers.norms import rounding
from deq_lm.solvers.scope import check_scope, split_units
from deq_lm.solvers.secant_history import ProductMatrix, SecantHistory


@dataclass(frozen=True)
class AndersonState(SolverState):
    """`gram`: <delta_residual_i, delta_residual_j>. `projections`: <delta_residual_i, residual>, (B, U, stored)."""

    history: SecantHistory
    gram: ProductMatrix
    projections: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Anderson(FixedPointSolver):
    """z <- f(z) - sum_j gamma_j delta_image_j with gamma minimizing ||residual - sum_j gamma_j delta_residual_j||.

    The least-squares problem is solved by normal equations scaled to unit diagonal, with a ridge of that scale's rounding:
    nothing in it has a unit, so scaling the problem scales the iterates. Where it cannot be solved the step is Picard's.

    Attributes:
        history_size: pairs kept, at least 1.
        relaxation: weight of the new value, in (0, 1]: z <- z_bar + relaxation (f_bar - z_bar) of the combined states.
        scope: what inner products look at.

    Raises:
        ValueError: if a value is out of range.

    References:
        Anderson 1965; Walker, Ni 2011, SIAM J. Numer. Anal. 49(4), algorithm AA.
    """

    history_size: int = 6
    relaxation: float = 1.0
    scope: Scope = "prefix"

    def __post_init__(self) -> None:
        if self.history_size < 1:
            raise ValueError(
                f"Anderson(history_size={self.history_size}): expected 1 or more pairs; Picard keeps none."
            )
        if not 0.0 < self.relaxation <= 1.0:
            raise ValueError(
                f"Anderson(relaxation={self.relaxation}): expected a value in (0, 1]; it is the weight of the new value."
            )
        check_scope("Anderson", self.scope)

    def init(self, f: FixedPointMap, z0: Tensor) -> AndersonState:
        units = split_units(z0, self.scope)
        return AndersonState(
            **vars(super().init(f, z0)),
            history=SecantHistory(units, self.history_size),
            gram=ProductMatrix(units, self.history_size),
            projections=None,
        )

    def step(self, f: FixedPointMap, state: SolverState, active: Tensor | None) -> AndersonState:
        assert isinstance(state, AndersonState)
        history, gram = state.history, state.gram
        proposal = state.image
        if state.projections is not None:
            gamma = self._coefficients(history, gram, state.projections)
            proposal = proposal - history.combine(0, gamma).view_as(proposal)
            if self.relaxation != 1.0:
                predicted = state.residual - history.combine(1, gamma).view_as(proposal)
                proposal = proposal - (1.0 - self.relaxation) * predicted
        elif self.relaxation != 1.0:
            proposal = torch.lerp(state.point, state.image, self.relaxation)
        new = evaluate(f, proposal, state, active)

        residual = split_units(new.residual, self.scope)
        delta_residual = residual - split_units(state.residual, self.scope)
        history.append(split_units(new.image - state.image, self.scope), delta_residual)
        projections, row = history.products(1, residual, delta_residual)
        gram.update(history, row, row)
        return AndersonState(**vars(new), history=history, gram=gram, projections=projections)

    @staticmethod
    def _coefficients(history: SecantHistory, gram: ProductMatrix, projections: Tensor) -> Tensor:
        matrix = gram.oldest_first(history)
        scale = matrix.diagonal(dim1=-2, dim2=-1).sqrt()
        usable = scale > 0
        scale = torch.where(usable, scale, torch.ones_like(scale))
        identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        matrix = matrix / scale[..., :, None] / scale[..., None, :] + rounding(matrix.dtype) * identity
        matrix = torch.where(usable[..., :, None] & usable[..., None, :], matrix, identity)
        right = torch.where(usable, history.chronological(projections, 1) / scale, 0.0)
        gamma, failed = torch.linalg.solve_ex(matrix, right)
        gamma = gamma / scale
        solved = (failed == 0)[..., None] & gamma.isfinite().all(dim=-1, keepdim=True)
        return history.ring_order(torch.where(solved, gamma, 0.0))
