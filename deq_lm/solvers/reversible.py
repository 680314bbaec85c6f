"""Reversible relaxed iteration: two interleaved states, each step of which can be undone without having been stored."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from deq_lm._types import FixedPointMap, Scope
from deq_lm.solvers.base import FixedPointSolver, SolverState, evaluate
from deq_lm.solvers.lattice import Lattice, push
from deq_lm.solvers.scope import check_scope, hold


@dataclass(frozen=True)
class ReversibleState(SolverState):
    """Adds the pair, on its lattice. A frozen unit keeps its pair and its digits.

    Attributes:
        lattice: where the pair lives.
        latest: w_k, of which `point` is the rounded value, (B, L, ...) float64.
        previous: w_{k-1}, likewise.
        words: digits lost so far, one int64 tensor per `lattice.digits_per_word` steps; only where steps are recorded.
    """

    lattice: Lattice
    latest: Tensor
    previous: Tensor
    words: tuple[Tensor, ...]

    @property
    def num_steps(self) -> int:
        return self.num_evaluations - 1


@dataclass(frozen=True, kw_only=True)
class Reversible(FixedPointSolver):
    """w_{k+1} = (1 - relaxation) w_{k-1} + relaxation f(w_k), from w_{-1} = w_0 = z0.

    The published iteration updates a pair, y <- (1 - relaxation) y + relaxation f(z) and then z with f(y) likewise; y and z
    in turn are the even and odd terms of this sequence, so a step here is half of one there, and costs one evaluation.
    An eigenvalue a of the Jacobian decays by the larger root of r^2 = relaxation a r + 1 - relaxation in modulus: 0.93 a
    step for a = 0.9 or -0.9 and relaxation 0.8, and sqrt(1 - relaxation) for small a and for imaginary ones up to
    2 sqrt(1 - relaxation) / relaxation, where Picard's may spiral out.

    The pair lives on a lattice (`deq_lm.solvers.lattice`) on which the step is exactly reversible, whatever the relaxation,
    dtype and number of steps; the price is log2(radix) bits per number and step: 1.6 bits for a relaxation of 0.5 and 2.8
    for 0.8, where storing the states would take 32.

    Attributes:
        relaxation: weight of the new value f(w_k), in (0, 1).
        scope: the iterates have no coefficients and are causal under either scope; it decides what the stopping rule
            judges as one, and under `sequence` that rule looks at the future.

    Raises:
        ValueError: if a value is out of range.

    References:
        McCallum, Arora, Foster 2025, "Reversible deep equilibrium models", section 3.
    """

    relaxation: float = 0.8
    scope: Scope = "prefix"
    differentiable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 < self.relaxation < 1.0:
            raise ValueError(
                f"Reversible(relaxation={self.relaxation}): expected a value strictly between 0 and 1. It is the weight of "
                "the new value f(z); 1 would keep nothing to run backwards from (that is Picard), and 0 would never move."
            )
        check_scope("Reversible", self.scope)

    def init(self, f: FixedPointMap, z0: Tensor) -> ReversibleState:
        start = super().init(f, z0)
        lattice = Lattice.around(z0, start.image, self.scope, self.relaxation)
        placed = lattice.place(z0)
        return ReversibleState(**vars(start), lattice=lattice, latest=placed, previous=placed, words=())

    def step(self, f: FixedPointMap, state: SolverState, active: Tensor | None) -> ReversibleState:
        assert isinstance(state, ReversibleState)
        lattice, words = state.lattice, state.words
        shrunk = lattice.shrink(state.previous)
        latest = hold(active, shrunk + lattice.increment(state.image), state.latest)
        previous = hold(active, state.latest, state.previous)
        if torch.is_grad_enabled():
            with torch.no_grad():
                words = push(words, lattice, state.num_steps, lattice.lost(state.previous, shrunk), active)
        new = evaluate(f, lattice.read(latest, state.point.dtype), state, active)
        return ReversibleState(**vars(new), lattice=lattice, latest=latest, previous=previous, words=words)

    def trail(self, state: SolverState) -> ReversibleState:
        assert isinstance(state, ReversibleState)
        tensors = {name: value.detach() for name, value in vars(state).items() if isinstance(value, Tensor)}
        return replace(state, **tensors)
