"""Exact arithmetic for steps that are run backwards: states on a lattice, and a product whose lost digits are kept.

w <- (1 - relaxation) w + relaxation f cannot be undone in floating point: the product drops log2(1 / (1 - relaxation)) bits
of w, and dividing by 1 - relaxation multiplies the rounding by as much, each time. Here w is a multiple of a power of two
(integers in float64, below 2^53), so that sums are exact, and what the rounded product drops is an integer of a few
values. These are kept, as the digits of a number: the step backwards is then exact to the last bit, however many there are.

References:
    Maclaurin, Duvenaud, Adams 2015, "Gradient-based hyperparameter optimization through reversible learning", section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deq_lm._types import Scope
from deq_lm.solvers.norms import unit_magnitude
from deq_lm.solvers.scope import hold

FRACTION_BITS = {torch.float32: 32, torch.float64: 47}
"""How much finer than the first f(z) of a unit the lattice is: beyond what float32 resolves; in float64, a compromise."""


@dataclass(frozen=True)
class Lattice:
    """Multiples of a quantum, as integers in float64, and the exactly reversible product with 1 - relaxation.

    Exact while states stay below 2^51 quanta, that is 2^19 (float32) or 16 (float64) times the largest entry of the first
    f(z). Beyond, sums are rounded as in all floating point, and the way back is no longer exact. The spacing limits what a
    solve can reach in float64: relative residuals below 1e-12 may stall.

    Attributes:
        quantum: spacing, a power of two for each unit, (B, U, 1, ...).
        relaxation: in (0, 1).
    """

    quantum: Tensor
    relaxation: float

    @classmethod
    def around(cls, z0: Tensor, image: Tensor, scope: Scope, relaxation: float) -> Lattice:
        """A lattice for states like z0 and f(z0), (B, L, ...). The quantum of a unit looks at what the unit may see."""
        magnitude = torch.maximum(unit_magnitude(z0.detach(), scope), unit_magnitude(image.detach(), scope))
        exponent = torch.frexp(magnitude.cummax(dim=1).values.double()).exponent - FRACTION_BITS[z0.dtype]
        quantum = torch.exp2(exponent.double())  # exactly, where `ldexp` takes a power that a GPU may round
        return cls(quantum.reshape(*quantum.shape, *(1,) * (z0.dim() - 2)), relaxation)

    def place(self, z: Tensor) -> Tensor:
        """The multiple nearest to z."""
        return _nearest(z.double() / self.quantum)

    def read(self, multiple: Tensor, dtype: torch.dtype) -> Tensor:
        """The state that a multiple stands for, rounded to `dtype`."""
        return (multiple * self.quantum).to(dtype)

    def increment(self, image: Tensor) -> Tensor:
        """relaxation * image."""
        return self.place(self.relaxation * image.double())

    def shrink(self, multiple: Tensor) -> Tensor:
        """(1 - relaxation) * multiple."""
        return _nearest((1.0 - self.relaxation) * multiple)

    def lost(self, multiple: Tensor, shrunk: Tensor) -> Tensor:
        """The digit that `shrink` dropped, int64 in [0, radix)."""
        digit = multiple - self._stretch(shrunk)
        return digit.clamp(-self._reach, self._reach).to(torch.int64) + self._reach

    def undo_shrink(self, shrunk: Tensor, digit: Tensor) -> Tensor:
        """The multiple that `shrink` was given."""
        return self._stretch(shrunk) + (digit - self._reach)

    def _stretch(self, shrunk: Tensor) -> Tensor:
        return (shrunk / (1.0 - self.relaxation)).round()

    @property
    def _reach(self) -> int:
        """Largest lost digit: half a quantum, stretched, and half of one; 1/8 more for the rounding of either operation."""
        return int(0.625 / (1.0 - self.relaxation) + 0.625)

    @property
    def radix(self) -> int:
        """Values of a digit: 3 for a relaxation of 0.5, 7 for 0.8."""
        return 2 * self._reach + 1

    @property
    def digits_per_word(self) -> int:
        """Digits an int64 holds: 39 for a relaxation of 0.5, 22 for 0.8."""
        count = 1
        while self.radix ** (count + 1) < 2**63:
            count += 1
        return count


def push(
    words: Sequence[Tensor], lattice: Lattice, step: int, digit: Tensor, active: Tensor | None
) -> tuple[Tensor, ...]:
    """Keep one digit of every number of the active units, as the last of step `step`; 8 bytes hold `digits_per_word`."""
    *full, word = words if step % lattice.digits_per_word else (*words, torch.zeros_like(digit))
    return (*full, hold(active, word * lattice.radix + digit, word))


def pop(words: list[Tensor], lattice: Lattice, step: int, active: Tensor) -> Tensor:
    """Take back, from the list in place, what `push` kept in step `step`; garbage for units not active in it."""
    place = step // lattice.digits_per_word
    word = words[place]
    words[place] = hold(active, word.div(lattice.radix, rounding_mode="floor"), word)
    return word.remainder(lattice.radix)


def _nearest(x: Tensor) -> Tensor:
    """Round to integers; for a gradient this is the identity."""
    return x + (x.round() - x).detach() if x.requires_grad else x.round()
