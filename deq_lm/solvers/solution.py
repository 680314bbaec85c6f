"""What a solve returns: the state, why it stopped, and what it cost, per sequence."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from deq_lm.solvers.base import SolverState
from deq_lm.solvers.norms import relative, unit_norm
from deq_lm.solvers.stopping import Outcome


@dataclass(frozen=True)
class ResidualTrace:
    """Residual norms of whole sequences after 0, 1, 2, ... steps; a frozen sequence repeats its last value.

    Attributes:
        residual_norm: ||f(z) - z||, (num_steps + 1, B).
        image_norm: ||f(z)||, same shape.
    """

    residual_norm: Tensor
    image_norm: Tensor

    @property
    def relative_residual(self) -> Tensor:
        """||f(z) - z|| / ||f(z)||, (num_steps + 1, B)."""
        return relative(self.residual_norm, self.image_norm)


@dataclass(frozen=True)
class Solution:
    """An approximate fixed point and the facts about it. No host-device synchronization until a value is read.

    Attributes:
        z: the returned state, (B, L, ...), float32 or wider.
        image: f(z) of that state.
        outcome: code of `Outcome` for each sequence, (B,) int8.
        residual_norm: ||f(z) - z|| of the returned state over the whole sequence, (B,).
        num_steps: steps until the last unit of the sequence stopped, (B,) int32.
        num_evaluations: evaluations of f until then, (B,) int32.
        position_num_steps: steps until each position stopped, (B, L) int32; equal along L under the sequence scope.
        position_num_evaluations: evaluations of f until each position stopped, likewise.
        used_fallback: whether some of its units went on with the fallback, (B,) bool.
        trace: residual norms step by step.
        trail: `FixedPointSolver.trail` of the last state, if the solve was differentiable.
    """

    z: Tensor
    image: Tensor
    outcome: Tensor
    residual_norm: Tensor
    num_steps: Tensor
    num_evaluations: Tensor
    position_num_steps: Tensor
    position_num_evaluations: Tensor
    used_fallback: Tensor
    trace: ResidualTrace
    trail: SolverState | None = None

    @property
    def relative_residual(self) -> Tensor:
        """||f(z) - z|| / ||f(z)|| of the returned state, (B,)."""
        return relative(self.residual_norm, unit_norm(self.image, "sequence").squeeze(1))

    @property
    def converged(self) -> Tensor:
        """(B,) bool."""
        return self.outcome == Outcome.CONVERGED

    def reversed_in_time(self) -> Solution:
        """The same, with its positions in the opposite order."""
        flipped = ("z", "image", "position_num_steps", "position_num_evaluations")
        return replace(self, **{name: getattr(self, name).flip(1) for name in flipped})
