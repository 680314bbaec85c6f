"""What a fixed-point solver is: a start and a step. When to stop is not its business."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deq_lm._types import FixedPointMap, Scope
from deq_lm.solvers.scope import hold


@dataclass(frozen=True)
class SolverState:
    """Where a solver stands; a solver with a memory extends it.

    Attributes:
        point: z, (B, L, ...).
        image: f(z) of that very z.
        num_evaluations: evaluations of f so far, per call of f on the whole batch.
    """

    point: Tensor
    image: Tensor
    num_evaluations: int

    @property
    def residual(self) -> Tensor:
        """image - point, undamped; computed, not kept."""
        return self.image - self.point


class FixedPointSolver(ABC):
    """Produces better and better z for f(z) = z.

    Attributes:
        scope: what its coefficients look at, and what the stopping rule judges as one; see `deq_lm.solvers.scope`.
        differentiable: whether its steps can be recorded by autograd.
        needs_proximal_form: whether it takes f apart (`deq_lm.solvers.proximal_form`), and so is for monotone cells alone.
    """

    scope: Scope
    differentiable: ClassVar[bool] = False
    needs_proximal_form: ClassVar[bool] = False

    def init(self, f: FixedPointMap, z0: Tensor) -> SolverState:
        """Evaluate f at the start."""
        return SolverState(z0, f(z0), 1)

    @abstractmethod
    def step(self, f: FixedPointMap, state: SolverState, active: Tensor | None) -> SolverState:
        """One step.

        Args:
            f: the map.
            state: what `init` or the last `step` returned; its memory may be written to, its tensors not.
            active: (B, U) bool: the units to move; the others stay as they are. None moves all.
        """

    def trail(self, state: SolverState) -> SolverState | None:
        """What it takes to run the solve that ended in `state` backwards, detached; None where that is impossible."""
        return None


def evaluate(f: FixedPointMap, proposal: Tensor, state: SolverState, active: Tensor | None) -> SolverState:
    """Move the active units to `proposal` and evaluate f there: the end of every step that costs one evaluation."""
    proposal = hold(active, proposal, state.point)  # rebound, so that the argument is freed before f runs
    image = f(proposal)
    if image.requires_grad:  # of a frozen unit too, it is recorded where the unit stopped
        image = hold(active, image, state.image)
    return SolverState(proposal, image, state.num_evaluations + 1)
