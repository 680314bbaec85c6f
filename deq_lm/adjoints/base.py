"""What an adjoint is: it runs a solve and returns f(z*) with a gradient attached, exact or approximate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from deq_lm._types import FixedPointMap
from deq_lm.solvers import FixedPointSolver, Solution


class DifferentiableMap(Protocol):
    """z -> f(z) that shows what else it reads: an `autograd.Function` cannot reach into a closure."""

    def __call__(self, z: Tensor, /) -> Tensor: ...

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The tensors besides z a gradient can flow to."""
        ...

    def with_inputs(self, inputs: Sequence[Tensor], /) -> DifferentiableMap:
        """The same map reading `inputs` in place of its own."""
        ...


class Solve(Protocol):
    """`deq_lm.solvers.solve` with solver and stopping rule chosen."""

    def __call__(self, f: FixedPointMap, z0: Tensor, /, *, differentiable: bool = False) -> Solution: ...


class Adjoint(ABC):
    """How a solve is differentiated; never how it is solved."""

    def check(self, solver: FixedPointSolver) -> None:  # noqa: B027  (most adjoints take any)
        """Raises ValueError if solves by `solver` cannot be differentiated this way."""

    @abstractmethod
    def apply(
        self,
        f: DifferentiableMap,
        z0: Tensor,
        solve: Solve,
        *,
        report: Callable[[Solution], None] | None = None,
    ) -> tuple[Tensor, Solution]:
        """Solve z = f(z) and attach a gradient.

        Args:
            f: the map, with its inputs in the caller's graph.
            z0: the start, (B, L, D); gets no gradient, since an equilibrium does not depend on it.
            solve: runs the forward solve.
            report: called in the backward pass with the `Solution` of the adjoint solve, by adjoints that have one.

        Returns:
            The output, f(z*) up to the residual, which carries the gradient; and the `Solution`, which carries none.
        """
