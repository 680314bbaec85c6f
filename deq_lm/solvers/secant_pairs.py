"""Pairs (delta_image, delta_residual) of consecutive states: what Anderson and the prefix form of Broyden remember.

Their steps are z+ = f(z) - sum_j gamma_j delta_image_j, and gamma solves sum_j <w_i, delta_residual_j> gamma_j =
<w_i, residual>: the choice of the test vectors w_i makes the method. Because each step starts from the raw pairs, dropping
the oldest one leaves no trace in the others, and the secant equations of all that are kept hold.

References:
    Fang, Saad 2009, "Two classes of multisecant methods for nonlinear acceleration". Walker, Ni 2011, "Anderson
    acceleration for fixed-point iterations".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deq_lm._types import Scope
from deq_lm.solvers.base import SolverState
from deq_lm.solvers.norms import rounding
from deq_lm.solvers.scope import accumulate, over, split_units
from deq_lm.solvers.secant_history import ProductMatrix, SecantHistory

IMAGES, RESIDUALS = 0, 1
"""The two rings."""

LESS_READILY = 1.1
"""Each restart of a unit raises the growth that the next one takes: on hard linear maps residuals have to rise at times."""


@dataclass(frozen=True)
class PairProducts:
    """The system for gamma, summed over what each unit may see, oldest pair first.

    Attributes:
        matrix: <w_i, delta_residual_j>, (B, U, m, m).
        projections: <w_i, residual>, (B, U, m).
        usable: which pairs count, (B, U, m) bool: not forgotten, and no rounding of the larger ones.
    """

    matrix: Tensor
    projections: Tensor
    usable: Tensor

    def solve(self, matrix: Tensor, projections: Tensor) -> Tensor:
        """gamma, (B, U, m), of a system made from this one; 0 for pairs that do not count, and where it has no solution."""
        identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        matrix = torch.where(self.usable[..., :, None] & self.usable[..., None, :], matrix, identity)
        gamma, failed = torch.linalg.solve_ex(matrix, torch.where(self.usable, projections, 0.0))
        solved = (failed == 0)[..., None] & (gamma.abs().amax(dim=-1, keepdim=True) < float("inf"))
        return torch.where(solved, gamma, 0.0)


class SecantPairs:
    """The newest pairs of a solve and their inner products. Written in place: it belongs to one solve.

    The test vectors are w_i = delta_residual_i - step_weight step_i, where step = delta_image - delta_residual.

    A unit whose residual is more than `restart_growth` times that of one step before forgets its pairs and takes a Picard
    step: what they promised did not hold. That lets it leave places where the residual has a minimum above zero, at which
    methods that minimize it would stay. The other units keep their pairs.
    """

    def __init__(
        self,
        z0: Tensor,
        capacity: int,
        scope: Scope,
        *,
        step_weight: float,
        restart_growth: float,
        half_precision: bool,
    ) -> None:
        units = split_units(z0, scope)  # (B, U, N)
        self._scope: Scope = scope
        self._step_weight = step_weight
        self._history = SecantHistory(units, capacity, num_rings=2, half_precision=half_precision)
        self._matrix = ProductMatrix(units, capacity)  # in each unit by itself, as the next two
        self._squares = units.new_zeros((*units.shape[:2], capacity))  # <delta_residual_i, delta_residual_i>, by slots
        self._projections = units.new_zeros((*units.shape[:2], 0))  # <w_i, residual> of one step before, by slots
        self._norm = torch.full_like(units[..., 0], float("inf"))  # of the residual of one step before
        self._growth = torch.full_like(self._norm, restart_growth)  # that makes the unit forget
        self._age = torch.zeros_like(self._norm)  # steps since it did

    def append(self, new: SolverState, old: SolverState) -> None:
        """Store the differences of two consecutive states."""
        image_row, residual_row = (row.view_as(new.point) for row in self._history.advance())
        if image_row.dtype == new.point.dtype:
            delta_image = torch.sub(new.image, old.image, out=image_row)
            delta_point = torch.sub(new.point, old.point, out=residual_row)
            torch.sub(delta_image, delta_point, out=residual_row)
        else:  # rounded once, not the differences of rounded ones
            delta_image = new.image - old.image
            image_row.copy_(delta_image)
            residual_row.copy_(delta_image - (new.point - old.point))

    def measure(self, residual: Tensor, active: Tensor | None) -> PairProducts:
        """Products with the residual, (B, L, ...), of the newest state; to be called once after each `append`.

        Frozen units are left out of the sums: their residuals are as small as they will get, and no combination of pairs
        moves them.
        """
        residual = split_units(residual, self._scope)
        size, square = residual.shape[-1], residual.square().sum(dim=-1)
        self._update(residual)
        del residual  # the caller's only one, and as large as what follows

        history = self._history
        self._forget_if_grown(accumulate(square if active is None else square * active).sqrt())
        squares = history.oldest_first(self._sum(self._squares[:, :, : len(history)], active))
        usable = history.oldest_first(history.usable)
        largest = torch.where(usable, squares, 0.0).amax(dim=-1, keepdim=True)
        usable = usable & (squares > rounding(squares.dtype) ** 2 * largest)
        if size < len(history):
            # More pairs than there are numbers to move leave gamma to the rounding: the newest that many count.
            num_numbers = size * accumulate(torch.ones_like(square) if active is None else active.to(square))
            usable = usable & (usable.flip(-1).cumsum(dim=-1).flip(-1) <= num_numbers[..., None])
        return PairProducts(
            self._sum(self._matrix.oldest_first(history), active),
            self._sum(history.oldest_first(self._projections), active),
            usable,
        )

    def _update(self, residual: Tensor) -> None:
        """Products of the newest pair and of the residual, (B, U, N), in each unit by itself."""
        history, newest, weight = self._history, self._history.newest, self._step_weight
        newest_image, newest_residual = (ring[newest] for ring in history.rings)
        self._squares[:, :, newest] = newest_residual.to(residual.dtype).square().sum(dim=-1)
        projections = history.products(RESIDUALS, residual)
        if weight:
            projections = (1.0 + weight) * projections - weight * history.products(IMAGES, residual)
        # <w_i, newest delta_residual> is the change of <w_i, residual>, but for the newest w itself.
        column = projections.clone()
        column[:, :, : self._projections.shape[-1]] -= self._projections
        if weight:
            row = history.products(RESIDUALS, torch.lerp(newest_residual, newest_image, -weight).to(residual.dtype))
        else:
            column[:, :, newest] = self._squares[:, :, newest]
            row = column
        self._matrix.update(history, row, column)
        self._projections = projections

    def correct_(self, out: Tensor, ring: int, weights: Tensor) -> Tensor:
        """Add sum_j weights_j row_j, weights (B, U, m) oldest first, to a contiguous state (B, L, ...) in place."""
        self._history.combine_(split_units(out, self._scope), ring, self._history.slots(weights))
        return out

    def __len__(self) -> int:
        return len(self._history)

    def _forget_if_grown(self, norm: Tensor) -> None:
        restart = (norm > self._growth * self._norm) & (self._age > 1)
        self._growth = torch.where(restart, LESS_READILY * self._growth, self._growth)
        self._history.forget(restart)
        self._age = torch.where(restart, 0.0, self._age + 1)
        self._norm = norm

    @staticmethod
    def _sum(products: Tensor, active: Tensor | None) -> Tensor:
        return accumulate(products if active is None else products * over(active, products))


def check_restart_growth(owner: str, restart_growth: float) -> None:
    """Raises ValueError unless `restart_growth` is above 0."""
    if not restart_growth > 0.0:
        raise ValueError(
            f"{owner}(restart_growth={restart_growth}): expected a value above 0. At 1.0 any growth counts; inf never does."
        )
