"""Pairs (delta_image, delta_residual) of consecutive states: what Anderson's and Broyden's second method remember.

Their steps are z+ = f(z) - sum_j gamma_j delta_image_j, and gamma follows from inner products of residual differences
alone: a full solve with their Gram matrix is Anderson acceleration, a solve with its upper triangle is Broyden's second
method. Because each step starts from the raw pairs, dropping the oldest one leaves no trace in the others, and the newest
secant equation holds exactly for any capacity.

References:
    Walker, Ni 2011, "Anderson acceleration for fixed-point iterations". Fang, Saad 2009, "Two classes of multisecant
    methods for nonlinear acceleration".
"""

from __future__ import annotations

import torch
from torch import Tensor

from deq_lm._types import Scope
from deq_lm.solvers.base import SolverState
from deq_lm.solvers.scope import accumulate, split_units
from deq_lm.solvers.secant_history import GramMatrix, SecantHistory

IMAGES, RESIDUALS = 0, 1
"""The two rings."""

LESS_READILY = 1.1
"""Each restart of a unit raises the growth that the next one takes: on hard linear maps residuals have to rise at times."""


class SecantPairs:
    """The newest pairs of a solve, with the Gram matrix of the residual differences.

    A unit whose residual is more than `restart_growth` times that of one step before forgets its pairs and takes a Picard
    step: what they promised did not hold. That lets it leave places where the residual has a minimum above zero, at which
    methods that minimize it would stay. The other units keep their pairs.
    """

    def __init__(self, z0: Tensor, capacity: int, scope: Scope, restart_growth: float) -> None:
        units = split_units(z0, scope)  # (B, U, N)
        self._scope: Scope = scope
        self._history = SecantHistory(units, capacity, num_rings=2)
        self._gram = GramMatrix(units, capacity)
        self._projections = units.new_zeros(
            (*units.shape[:2], 0)
        )  # <delta_residual_j, residual> in each unit by itself
        self._norm = torch.full_like(units[..., 0], float("inf"))  # of the residual one step before
        self._growth = torch.full_like(self._norm, restart_growth)  # that makes the unit forget
        self._age = torch.zeros_like(self._norm)  # steps since the unit forgot its pairs

    def append(self, new: SolverState, old: SolverState) -> None:
        """Store the differences of two consecutive states."""
        image_row, residual_row = (row.view_as(new.point) for row in self._history.advance())
        delta_image = torch.sub(new.image, old.image, out=image_row)
        delta_point = torch.sub(new.point, old.point, out=residual_row)
        torch.sub(delta_image, delta_point, out=residual_row)

    def measure(self, residual: Tensor, active: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Inner products with the residual, (B, L, ...), of the newest state; to be called once after each `append`.

        They are sums over what each unit may see and is still active. Frozen units are left out: their residuals are as
        small as they will get, and no combination of pairs moves them.

        Returns:
            The Gram matrix of the residual differences, (B, U, m, m), their products with the residual, (B, U, m), and
            which pairs count, (B, U, m) bool; all oldest pair first.
        """
        history, newest = self._history, self._history.newest
        residual = split_units(residual, self._scope)
        squares = residual.square().sum(dim=-1)
        projections = history.products(RESIDUALS, residual)
        del residual  # the caller's only one, and as large as what follows
        row = history.rings[RESIDUALS][newest]
        # <row_j, newest row> is the change of <row_j, residual>, but for the newest row itself.
        gram_row = projections.clone()
        gram_row[:, :, : self._projections.shape[-1]] -= self._projections
        gram_row[:, :, newest] = (row * row).sum(dim=-1)
        self._gram.update(history, gram_row)
        self._projections = projections

        gram = self._gram.oldest_first(history)
        projections = history.oldest_first(projections)
        if active is not None:
            squares = squares * active
            gram, projections = gram * active[..., None, None], projections * active[..., None]
        self._forget_if_grown(accumulate(squares).sqrt())
        return accumulate(gram), accumulate(projections), history.oldest_first(history.usable)

    def correct_(self, out: Tensor, ring: int, weights: Tensor) -> Tensor:
        """Add sum_j weights_j row_j, weights (B, U, m) oldest first, to a contiguous state (B, L, ...) in place."""
        self._history.combine_(split_units(out, self._scope), ring, self._history.slots(weights))
        return out

    def _forget_if_grown(self, norm: Tensor) -> None:
        restart = (norm > self._growth * self._norm) & (self._age > 1)
        self._growth = torch.where(restart, LESS_READILY * self._growth, self._growth)
        self._history.forget(restart)
        self._age = torch.where(restart, 0.0, self._age + 1)
        self._norm = norm

    def __len__(self) -> int:
        return len(self._history)


def check_restart_growth(owner: str, restart_growth: float) -> None:
    """Raises ValueError unless `restart_growth` is above 0."""
    if not restart_growth > 0.0:
        raise ValueError(
            f"{owner}(restart_growth={restart_growth}): expected a value above 0. At 1.0 any growth counts; inf never does."
        )
