"""Relaxed Picard iteration, z <- z + relaxation (f(z) - z): the reference for every other solver."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deq_lm._types import FixedPointMap, Scope
from deq_lm.solvers.base import FixedPointSolver, SolverState, evaluate
from deq_lm.solvers.scope import check_scope


@dataclass(frozen=True, kw_only=True)
class Picard(FixedPointSolver):
    """z <- (1 - relaxation) z + relaxation f(z). Converges where the relaxed map contracts.

    Attributes:
        relaxation: weight of the new value f(z), in (0, 1]; 1 is undamped.
        scope: the iterates have no coefficients and are causal under either scope; it decides what the stopping rule
            judges as one, and under `sequence` that rule looks at the future.

    Raises:
        ValueError: if a value is out of range.
    """

    relaxation: float = 1.0
    scope: Scope = "prefix"
    differentiable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 < self.relaxation <= 1.0:
            raise ValueError(
                f"Picard(relaxation={self.relaxation}): expected a value in (0, 1]. It is the weight of the new value "
                "f(z); 1.0 is undamped, and 0 would never move."
            )
        check_scope("Picard", self.scope)

    def step(self, f: FixedPointMap, state: SolverState, active: Tensor | None) -> SolverState:
        relaxed = self.relaxation != 1.0
        proposal = torch.lerp(state.point, state.image, self.relaxation) if relaxed else state.image
        return evaluate(f, proposal, state, active)
