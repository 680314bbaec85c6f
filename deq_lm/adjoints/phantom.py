"""Phantom gradient: backpropagate through k relaxed steps taken from z*."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deq_lm.adjoints.base import Adjoint, DifferentiableMap, Solve
from deq_lm.solvers import Solution


@dataclass(frozen=True, kw_only=True)
class Phantom(Adjoint):
    """z <- (1 - relaxation) z + relaxation f(z), k times from z*, recorded.

    On a map with Jacobian J it replaces (I - J)^-1 by relaxation sum_{i<k} ((1 - relaxation) I + relaxation J)^i. The saved
    activations grow with k.

    Attributes:
        num_steps: k, at least 1.
        relaxation: weight of the new value f(z), in (0, 1].

    Raises:
        ValueError: if a value is out of range.

    References:
        Geng, Zhang, Bai, Wang, Lin 2021, "On training implicit models", equation 8.
    """

    num_steps: int = 5
    relaxation: float = 0.8

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"Phantom(num_steps={self.num_steps}): expected 1 or more; 0 would carry no gradient.")
        if not 0.0 < self.relaxation <= 1.0:
            raise ValueError(
                f"Phantom(relaxation={self.relaxation}): expected a value in (0, 1]; it is the weight of the new value."
            )

    def apply(
        self,
        f: DifferentiableMap,
        z0: Tensor,
        solve: Solve,
        *,
        report: Callable[[Solution], None] | None = None,
    ) -> tuple[Tensor, Solution]:
        solution = solve(f, z0)
        z = solution.z
        for _ in range(self.num_steps):
            z = torch.lerp(z, f(z), self.relaxation) if self.relaxation != 1.0 else f(z)
        return z, solution
