"""Anderson acceleration (type II): the combination of recent steps that minimizes the linearized residual."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deq_lm._types import FixedPointMap, Scope
from deq_lm.solvers.base import FixedPointSolver, SolverState, evaluate
from deq_lm.solvers.norms import rounding
from deq_lm.solvers.scope import check_scope
from deq_lm.solvers.secant_pairs import IMAGES, RESIDUALS, PairProducts, SecantPairs, check_restart_growth


@dataclass(frozen=True)
class AndersonState(SolverState):
    """Adds the `pairs` remembered."""

    pairs: SecantPairs


@dataclass(frozen=True, kw_only=True)
class Anderson(FixedPointSolver):
    """z <- f(z) - sum_j gamma_j delta_image_j with gamma minimizing ||residual - sum_j gamma_j delta_residual_j||.

    That is w_i = delta_residual_i (`secant_pairs`). The least-squares problem is solved by normal equations scaled to unit
    diagonal, with a ridge of that scale's rounding: nothing in it has a unit, so scaling the problem scales the iterates.
    Where it cannot be solved the step is Picard's. Keeps 2 x history_size states.

    Attributes:
        history_size: pairs kept, at least 1.
        relaxation: weight of the new value, in (0, 1]: z <- z_bar + relaxation (f_bar - z_bar) of the combined states.
        scope: what inner products look at.
        restart_growth: a unit forgets its pairs where its residual is more than this times that of one step before (and the
            next time a little later); inf never does.
        half_precision_history: keep the pairs in bfloat16, at half the memory; states and inner products stay as they are.

    Raises:
        ValueError: if a value is out of range.

    References:
        Anderson 1965; Walker, Ni 2011, SIAM J. Numer. Anal. 49(4), algorithm AA.
    """

    history_size: int = 6
    relaxation: float = 1.0
    scope: Scope = "prefix"
    restart_growth: float = 1.0
    half_precision_history: bool = False

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
        pairs = SecantPairs(
            z0,
            self.history_size,
            self.scope,
            step_weight=0.0,
            restart_growth=self.restart_growth,
            half_precision=self.half_precision_history,
        )
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
        gamma = _least_squares(pairs.measure(state.residual, active))
        if not damping:
            return pairs.correct_(state.image.clone(memory_format=torch.contiguous_format), IMAGES, -gamma)
        proposal = torch.sub(state.image, state.residual, alpha=damping).contiguous()
        return pairs.correct_(pairs.correct_(proposal, IMAGES, -gamma), RESIDUALS, damping * gamma)


def _least_squares(products: PairProducts) -> Tensor:
    """gamma, (B, U, m), by normal equations of unit diagonal."""
    gram = products.matrix
    scale = torch.where(products.usable, gram.diagonal(dim1=-2, dim2=-1).sqrt(), 1.0)
    ridge = rounding(gram.dtype) * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    matrix = gram / scale[..., :, None] / scale[..., None, :] + ridge
    return products.solve(matrix, products.projections / scale) / scale
