"""Broyden's method with limited memory: the first update over whole sequences, the second over causal prefixes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deq_lm._types import FixedPointMap, Scope
from deq_lm.solvers.base import FixedPointSolver, SolverState, evaluate
from deq_lm.solvers.norms import rounding
from deq_lm.solvers.scope import accumulate, check_scope, split_units
from deq_lm.solvers.secant_history import ProductMatrix, SecantHistory


@dataclass(frozen=True)
class BroydenState(SolverState):
    """Adds the memory of the method.

    Attributes:
        history: pairs (delta_image, delta_residual) under the prefix scope, (delta_image, step) under the sequence scope.
        products: the matrix whose (triangular) solve gives the coefficients.
        projections: inner products of the stored rows with the residual, (B, U, stored); None before the first step.
        lowest: lowest residual norm of each unit since its last restart, (B, U).
        age: steps of each unit since then, (B, U).
    """

    history: SecantHistory
    products: ProductMatrix
    projections: Tensor | None
    lowest: Tensor
    age: Tensor


@dataclass(frozen=True, kw_only=True)
class Broyden(FixedPointSolver):
    """Quasi-Newton steps z <- z - H (f(z) - z), H an approximate inverse Jacobian that starts as -I.

    `scope="sequence"` is Broyden's first ("good") method, the papers', in compact form: gamma solves
    (<step_i, delta_residual_j> + [i > j] <step_i, step_j>) gamma = <step_i, residual>. On a linear map of dimension n with
    full history it ends within 2n steps. Its unconverged iterates see the future.

    `scope="prefix"` is Broyden's second ("bad") method, with every inner product a prefix sum: gamma solves the upper
    triangle of the Gram matrix of residual differences, newest pair first. Its denominators are sums of squares and cannot
    vanish alone, which the first method's can under prefix sums (it diverges there). A prefix whose residual grows beyond
    `restart_growth` times its lowest forgets its pairs and restarts from a Picard step: the other prefixes keep theirs.

    Attributes:
        history_size: pairs kept, at least 1; 15-20 lose no evaluation to a full history on trained cells.
        scope: what inner products look at.
        restart_growth: prefix scope only: forget at this growth of the residual over its lowest value since the last
            restart; inf never does. A restarted prefix is left `history_size` or 5 steps, whichever is less, to recover.

    Raises:
        ValueError: if a value is out of range.

    References:
        Broyden 1965, Math. Comp. 19. Byrd, Nocedal, Schnabel 1994. Gay 1979 (termination in 2n steps).
        Bai, Kolter, Koltun 2019, "Deep equilibrium models", section 3.1.
    """

    history_size: int = 16
    scope: Scope = "prefix"
    restart_growth: float = 5.0

    def __post_init__(self) -> None:
        if self.history_size < 1:
            raise ValueError(f"Broyden(history_size={self.history_size}): expected 1 or more pairs; Picard keeps none.")
        if not self.restart_growth > 1.0:
            raise ValueError(
                f"Broyden(restart_growth={self.restart_growth}): expected a value above 1; inf never restarts."
            )
        check_scope("Broyden", self.scope)

    def init(self, f: FixedPointMap, z0: Tensor) -> BroydenState:
        units = split_units(z0, self.scope)
        start = super().init(f, z0)
        norm = self._prefix_norm(split_units(start.residual, self.scope))
        return BroydenState(
            **vars(start),
            history=SecantHistory(units, self.history_size),
            products=ProductMatrix(units, self.history_size),
            projections=None,
            lowest=norm,
            age=torch.zeros_like(norm),
        )

    def step(self, f: FixedPointMap, state: SolverState, active: Tensor | None) -> BroydenState:
        assert isinstance(state, BroydenState)
        history, products = state.history, state.products
        proposal = state.image
        if state.projections is not None:
            coefficients = self._second if self.scope == "prefix" else self._first
            gamma = coefficients(history, products, state.projections)
            proposal = proposal - history.combine(0, gamma).view_as(proposal)
        new = evaluate(f, proposal, state, active)

        residual = split_units(new.residual, self.scope)
        delta_image = split_units(new.image - state.image, self.scope)
        if self.scope == "prefix":
            delta_residual = residual - split_units(state.residual, self.scope)
            history.append(delta_image, delta_residual)
            projections, row = history.products(1, residual, delta_residual)
            products.update(history, row, row)
            lowest, age = self._restart_grown(history, residual, state)
        else:
            step = split_units(new.point - state.point, self.scope)
            history.append(delta_image, step)
            before = split_units(state.residual, self.scope)
            projections, projections_before, steps = history.products(1, residual, before, step)
            (images,) = history.products(0, step)
            # <step, delta_residual_j> + <step, step_j> is <step, delta_image_j>, and the newest row lies below the diagonal
            # but for its own entry.
            newest = torch.arange(len(history), device=steps.device) == history.newest
            products.update(history, torch.where(newest, images - steps, images), projections - projections_before)
            lowest, age = state.lowest, state.age
        return BroydenState(
            **vars(new), history=history, products=products, projections=projections, lowest=lowest, age=age
        )

    @staticmethod
    def _second(history: SecantHistory, products: ProductMatrix, projections: Tensor) -> Tensor:
        gram = products.oldest_first(history)
        squares = gram.diagonal(dim1=-2, dim2=-1)
        # A difference that is rounding of the larger ones says nothing about the map.
        noise = rounding(gram.dtype) ** 2 * squares.amax(dim=-1, keepdim=True)
        usable = history.chronological(history.usable, 1) & (squares > noise)
        identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        gram = torch.where(usable[..., :, None], gram, identity)
        right = torch.where(usable, history.chronological(projections, 1), 0.0)
        gamma = torch.linalg.solve_triangular(gram, right[..., None], upper=True).squeeze(-1)
        finite = gamma.isfinite().all(dim=-1, keepdim=True)
        return history.ring_order(torch.where(finite, gamma, 0.0))

    @staticmethod
    def _first(history: SecantHistory, products: ProductMatrix, projections: Tensor) -> Tensor:
        matrix = products.oldest_first(history)
        gamma, failed = torch.linalg.solve_ex(matrix, history.chronological(projections, 1))
        solved = (failed == 0)[..., None] & gamma.isfinite().all(dim=-1, keepdim=True)
        return history.ring_order(torch.where(solved, gamma, 0.0))

    def _restart_grown(self, history: SecantHistory, residual: Tensor, state: BroydenState) -> tuple[Tensor, Tensor]:
        norm = self._prefix_norm(residual)
        age = state.age + 1
        restart = (norm > self.restart_growth * state.lowest) & (age >= min(self.history_size, 5))
        history.forget(restart)
        lowest = torch.where(restart, norm, torch.minimum(norm, state.lowest))
        return lowest, torch.where(restart, 0, age)

    @staticmethod
    def _prefix_norm(residual: Tensor) -> Tensor:
        return accumulate(residual.square().sum(dim=-1)).sqrt()
