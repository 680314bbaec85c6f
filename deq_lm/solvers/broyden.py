"""Broyden's method with limited memory: the first update over whole sequences, the second over causal prefixes."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from deq_lm._types import FixedPointMap, Scope
from deq_lm.errors import UnusedSettingWarning
from deq_lm.solvers.base import FixedPointSolver, SolverState, evaluate
from deq_lm.solvers.norms import rounding
from deq_lm.solvers.scope import check_scope, split_units
from deq_lm.solvers.secant_history import GramMatrix, SecantHistory
from deq_lm.solvers.secant_pairs import IMAGES, SecantPairs, check_restart_growth


@dataclass(frozen=True)
class FirstState(SolverState):
    """Adds the newest steps and their Gram matrix (sequence scope)."""

    steps: SecantHistory
    gram: GramMatrix


@dataclass(frozen=True)
class SecondState(SolverState):
    """Adds the `pairs` remembered (prefix scope)."""

    pairs: SecantPairs


@dataclass(frozen=True, kw_only=True)
class Broyden(FixedPointSolver):
    """Quasi-Newton steps z <- z - H (f(z) - z), H an approximate inverse Jacobian that starts as -I.

    `scope="sequence"` is Broyden's first ("good") method, the papers', in Kelley's form: because every step s is the full
    quasi-Newton step, H is a product of (I + s_{j+1} s_j^T / ||s_j||^2) and the steps are all it needs. It keeps
    history_size states and starts over when they are full: the factors belong together, and a product that loses its
    oldest ones stalls where one that starts over converges. On a linear map of dimension n with full history it ends within
    2n steps. Its unconverged iterates see the future.

    `scope="prefix"` is Broyden's second ("bad") method, with every inner product a prefix sum: gamma solves the upper
    triangle of the Gram matrix of residual differences, newest pair first. Its denominators are sums of squares and cannot
    vanish alone, which the first method's can under prefix sums (it diverges there). It keeps 2 x history_size states, and
    a prefix whose residual grows forgets its own (`SecantPairs`).

    Attributes:
        history_size: steps or pairs kept, at least 1; 15-20 lose no evaluation to a full history on trained cells.
        scope: what inner products look at.
        restart_growth: prefix scope only: a prefix forgets its pairs where its residual is more than this times that of one
            step before (and the next time a little later); inf never does.

    Raises:
        ValueError: if a value is out of range.

    References:
        Broyden 1965, Math. Comp. 19. Kelley 1995, "Iterative methods for linear and nonlinear equations", section 7.3.
        Gay 1979 (termination in 2n steps). Bai, Kolter, Koltun 2019, "Deep equilibrium models", section 3.1.
    """

    history_size: int = 16
    scope: Scope = "prefix"
    restart_growth: float = 1.0

    def __post_init__(self) -> None:
        if self.history_size < 1:
            raise ValueError(f"Broyden(history_size={self.history_size}): expected 1 or more pairs; Picard keeps none.")
        check_restart_growth("Broyden", self.restart_growth)
        check_scope("Broyden", self.scope)
        if self.scope == "sequence" and self.restart_growth != type(self).restart_growth:
            warnings.warn(
                f"Broyden(scope='sequence', restart_growth={self.restart_growth}): restart_growth has no effect there.",
                UnusedSettingWarning,
                stacklevel=2,
            )

    def init(self, f: FixedPointMap, z0: Tensor) -> FirstState | SecondState:
        start = super().init(f, z0)
        units = split_units(z0, self.scope)
        if self.scope == "sequence":
            steps = SecantHistory(units, self.history_size, num_rings=1)
            return FirstState(**vars(start), steps=steps, gram=GramMatrix(units, self.history_size))
        pairs = SecantPairs(z0, self.history_size, self.scope, self.restart_growth)
        return SecondState(**vars(start), pairs=pairs)

    def step(self, f: FixedPointMap, state: SolverState, active: Tensor | None) -> FirstState | SecondState:
        if isinstance(state, FirstState):
            new = evaluate(f, state.point + self._first_step(state), state, active)
            return FirstState(**vars(new), steps=state.steps, gram=state.gram)
        assert isinstance(state, SecondState)
        new = evaluate(f, self._second_proposal(state, active), state, active)
        state.pairs.append(new, state)
        return SecondState(**vars(new), pairs=state.pairs)

    @staticmethod
    def _first_step(state: FirstState) -> Tensor:
        """-H residual, (B, L, ...), stored as the newest step."""
        steps, gram = state.steps, state.gram
        if steps.is_full:
            steps.clear()
        step = split_units(state.residual.contiguous(), "sequence")  # (B, 1, N)
        if len(steps) > 0:
            projections = steps.oldest_first(steps.products(0, step))
            weights, scale = _first_weights(gram.oldest_first(steps), projections)
            steps.combine_(step, 0, steps.slots(weights))
            step *= scale[..., None]
        (row,) = steps.advance()
        row.copy_(step)
        gram.update(steps, steps.products(0, step))
        return step.view_as(state.point)

    @staticmethod
    def _second_proposal(state: SecondState, active: Tensor | None) -> Tensor:
        pairs = state.pairs
        if len(pairs) == 0:
            return state.image
        gamma = _second_weights(*pairs.measure(state.residual, active))
        return pairs.correct_(state.image.clone(memory_format=torch.contiguous_format), IMAGES, -gamma)


def _first_weights(gram: Tensor, projections: Tensor) -> tuple[Tensor, Tensor]:
    """(c, scale) with -H r = scale (r + sum_i c_i s_i).

    From <s_i, s_j>, (B, 1, m, m), and <s_i, r>, (B, 1, m), oldest first.

    The factor of s_j adds s_{j+1} <s_j, v> / ||s_j||^2 to the v so far: one row of a triangular system for the weights of
    all steps but the oldest. The factor of the newest step has the step sought on both sides, which makes it a scale.
    """
    squares = gram.diagonal(dim1=-2, dim2=-1)
    usable = squares > 0
    shifted = -gram[..., :-1, 1:].tril(diagonal=-1)
    safe = torch.where(usable, squares, 1.0)
    matrix = shifted + torch.diag_embed(safe[..., :-1])
    right = torch.where(usable, projections, 0.0)[..., :-1, None]
    weights = torch.linalg.solve_triangular(matrix, right, upper=False).squeeze(-1)
    weights = torch.nn.functional.pad(weights, (1, 0))
    along_newest = (projections[..., -1] + (gram[..., -1, :] * weights).sum(dim=-1)) / safe[..., -1]
    scale = 1.0 / (1.0 - along_newest)
    finite = weights.isfinite().all(dim=-1) & scale.isfinite()
    return torch.where(finite[..., None], weights, 0.0), torch.where(finite, scale, 1.0)


def _second_weights(gram: Tensor, projections: Tensor, usable: Tensor) -> Tensor:
    """gamma, (B, U, m), from what `SecantPairs.measure` gives."""
    squares = torch.where(usable, gram.diagonal(dim1=-2, dim2=-1), 0.0)
    # A difference that is rounding of the larger ones says nothing about the map.
    usable = usable & (squares > rounding(gram.dtype) ** 2 * squares.amax(dim=-1, keepdim=True))
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    triangle = torch.where(usable[..., :, None], gram, identity)
    right = torch.where(usable, projections, 0.0)
    gamma = torch.linalg.solve_triangular(triangle, right[..., None], upper=True).squeeze(-1)
    return torch.where(gamma.isfinite().all(dim=-1, keepdim=True), gamma, 0.0)
