"""Broyden's method with limited memory: the first update over whole sequences, a multisecant form over causal prefixes."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from deq_lm._types import FixedPointMap, Scope
from deq_lm.errors import UnusedSettingWarning
from deq_lm.solvers.base import FixedPointSolver, SolverState, evaluate
from deq_lm.solvers.norms import unit_norm
from deq_lm.solvers.scope import check_scope, over, split_units
from deq_lm.solvers.secant_history import ProductMatrix, SecantHistory
from deq_lm.solvers.secant_pairs import IMAGES, SecantPairs, check_restart_growth


@dataclass(frozen=True)
class StepsState(SolverState):
    """Adds the newest steps and their Gram matrix (sequence scope)."""

    steps: SecantHistory
    gram: ProductMatrix


@dataclass(frozen=True)
class MultisecantState(SolverState):
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

    `scope="prefix"` is a multisecant form of the update, with every inner product a prefix sum, in which every secant
    equation kept holds: H = -I + sum of the rank-one terms that w_i = delta_residual_i - step_i select (`secant_pairs`).
    w_i = step_i would be the first method, whose denominators vanish under prefix sums, where it diverges; w_i =
    delta_residual_i the second, which creeps where f barely contracts. For an eigenvalue l of f' the sum gives
    <w, delta_residual> = (l - 1)(l - 2) ||step||^2, positive for all l < 1, led by the step near l = 1 and by the residual
    where f is steep. It keeps 2 x history_size states; a prefix whose residual grows forgets its own, and none moves
    further from f(z) than `max_step` times its residual.

    Attributes:
        history_size: steps or pairs kept, at least 1.
        scope: what inner products look at.
        restart_growth: prefix scope only: a prefix forgets its pairs where its residual is more than this times that of one
            step before (and the next time a little later); inf never does.
        max_step: prefix scope only: longest correction of the Picard step, in residuals of the prefix; inf sets no limit.
        half_precision_history: keep it in bfloat16, at half the memory; states and inner products stay as they are.

    Raises:
        ValueError: if a value is out of range.

    References:
        Broyden 1965, Math. Comp. 19. Gay 1979 (termination in 2n steps). Kelley 1995, "Iterative methods for linear and
        nonlinear equations", section 7.3. Fang, Saad 2009 (multisecant updates). Bai, Kolter, Koltun 2019, "Deep
        equilibrium models", section 3.1.
    """

    history_size: int = 8
    scope: Scope = "prefix"
    restart_growth: float = 1.0
    max_step: float = 10.0
    half_precision_history: bool = False

    def __post_init__(self) -> None:
        if self.history_size < 1:
            raise ValueError(f"Broyden(history_size={self.history_size}): expected 1 or more pairs; Picard keeps none.")
        check_restart_growth("Broyden", self.restart_growth)
        check_scope("Broyden", self.scope)
        if not self.max_step > 0.0:
            raise ValueError(f"Broyden(max_step={self.max_step}): expected a value above 0; inf sets no limit.")
        for name in ("restart_growth", "max_step"):
            if self.scope == "sequence" and getattr(self, name) != getattr(type(self), name):
                warnings.warn(
                    f"Broyden(scope='sequence', {name}={getattr(self, name)}): {name} has no effect under this scope.",
                    UnusedSettingWarning,
                    stacklevel=2,
                )

    def init(self, f: FixedPointMap, z0: Tensor) -> StepsState | MultisecantState:
        start = super().init(f, z0)
        units = split_units(z0, self.scope)
        if self.scope == "sequence":
            steps = SecantHistory(units, self.history_size, num_rings=1, half_precision=self.half_precision_history)
            return StepsState(**vars(start), steps=steps, gram=ProductMatrix(units, self.history_size))
        pairs = SecantPairs(
            z0,
            self.history_size,
            self.scope,
            step_weight=1.0,
            restart_growth=self.restart_growth,
            half_precision=self.half_precision_history,
        )
        return MultisecantState(**vars(start), pairs=pairs)

    def step(self, f: FixedPointMap, state: SolverState, active: Tensor | None) -> StepsState | MultisecantState:
        if isinstance(state, StepsState):
            new = evaluate(f, state.point + self._first_step(state), state, active)
            return StepsState(**vars(new), steps=state.steps, gram=state.gram)
        assert isinstance(state, MultisecantState)
        new = evaluate(f, self._multisecant_proposal(state, active), state, active)
        state.pairs.append(new, state)
        return MultisecantState(**vars(new), pairs=state.pairs)

    @staticmethod
    def _first_step(state: StepsState) -> Tensor:
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
        steps.advance()[0].copy_(step)
        row = steps.products(0, step)
        gram.update(steps, row, row)
        return step.view_as(state.point)

    def _multisecant_proposal(self, state: MultisecantState, active: Tensor | None) -> Tensor:
        pairs = state.pairs
        if len(pairs) == 0:
            return state.image
        products = pairs.measure(state.residual, active)
        gamma = products.solve(products.matrix, products.projections)
        proposal = pairs.correct_(torch.zeros_like(state.image, memory_format=torch.contiguous_format), IMAGES, -gamma)
        length = unit_norm(proposal, self.scope)
        allowed = self.max_step * unit_norm(state.residual, self.scope)
        factor = torch.where(length > allowed, allowed / length, 1.0)
        return proposal.mul_(over(factor, proposal)).add_(state.image)


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
    finite = weights.abs().amax(dim=-1) + scale.abs() < float("inf")
    return torch.where(finite[..., None], weights, 0.0), torch.where(finite, scale, 1.0)
