"""Anderson acceleration (type II): the combination of recent steps that minimizes the linearized residual."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deq_lm._types import FixedPointMap, Scope
from deq_lm.solvers.base import FixedPointSolver, SolverState, evaluate
from deq_lm.solvers.norms import rounding
from deq_lm.solvers.scope import check_scope
from deq_lm.solvers.secant_pairs import IMAGES, RESIDUALS, SecantPairs, check_restart_growth


@dataclass(frozen=True)
class AndersonState(SolverState):
    """Adds the `pairs` remembered."""

    pairs: SecantPairs


@dataclass(frozen=True, kw_only=True)
class Anderson(FixedPointSolver):
    """z <- f(z) - sum_j gamma_j delta_image_j with gamma minimizing ||residual - sum_j gamma_j delta_residual_j||.

    The least-squares problem is solved by normal equations scaled to unit diagonal, with a ridge of that scale's rounding:
    nothing in it has a unit, so scaling the problem scales the iterates. Where it cannot be solved the step is Picard's.
    Keeps 2 x history_size states.

    Attributes:
        history_size: pairs kept, at least 1.
        relaxation: weight of the new value, in (0, 1]: z <- z_bar + relaxation (f_bar - z_bar) of the combined states.
        scope: what inner products look at.
        restart_growth: a unit forgets its pairs where its residual is more than this times that of one step before (and the
            next time a little later); inf never does.

    Raises:
        ValueError: if a value is out of range.

    References:
        Anderson 1965; Walker, Ni 2011, SIAM J. Numer. Anal. 49(4), algorithm AA.
    """

    history_size: int = 6
    relaxation: float = 1.0
    scope: Scope = "prefix"
    restart_growth: float = 1.0

    def __post_init__(self) -> None:
        if self.history_size < 1:
            raise ValueError(
                f"Anderson(history_size={self.history_size}): expected 1 or more pairs; Picard keeps none."
            )
        if not 0.0 < self.relaxation <= 1.0:
            raise ValueError(
                f"Anderson(relaxation={self.relaxation}): expected a value in (0, 1]; it is the weight of the new value."
            )
        check_restart_growth("Anderson", self.restart_growth)
        check_scope("Anderson", self.scope)

    def init(self, f: FixedPointMap, z0: Tensor) -> AndersonState:
        pairs = SecantPairs(z0, self.history_size, self.scope, self.restart_growth)
        return AndersonState(**vars(super().init(f, z0)), pairs=pairs)

    def step(self, f: FixedPointMap, state: SolverState, active: Tensor | None) -> AndersonState:
        assert isinstance(state, AndersonState)
        new = evaluate(f, self._proposal(state, active), state, active)
        state.pairs.append(new, state)
        return AndersonState(**vars(new), pairs=state.pairs)

    def _proposal(self, state: AndersonState, active: Tensor | None) -> Tensor:
        pairs, damping = state.pairs, 1.0 - self.relaxation
        if len(pairs) == 0:
            return torch.sub(state.image, state.residual, alpha=damping) if damping else state.image
        gamma = _coefficients(*pairs.measure(state.residual, active))
        if not damping:
            return pairs.correct_(state.image.clone(memory_format=torch.contiguous_format), IMAGES, -gamma)
        proposal = torch.sub(state.image, state.residual, alpha=damping).contiguous()
        return pairs.correct_(pairs.correct_(proposal, IMAGES, -gamma), RESIDUALS, damping * gamma)


def _coefficients(gram: Tensor, projections: Tensor, usable: Tensor) -> Tensor:
    """gamma, (B, U, m), from what `SecantPairs.measure` gives."""
    scale = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    usable = usable & (scale > 0)
    scale = torch.where(usable, scale, 1.0)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    matrix = gram / scale[..., :, None] / scale[..., None, :] + rounding(gram.dtype) * identity
    matrix = torch.where(usable[..., :, None] & usable[..., None, :], matrix, identity)
    gamma, failed = torch.linalg.solve_ex(matrix, torch.where(usable, projections / scale, 0.0))
    gamma = gamma / scale
    solved = (failed == 0)[..., None] & gamma.isfinite().all(dim=-1, keepdim=True)
    return torch.where(solved, gamma, 0.0)
