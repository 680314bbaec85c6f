"""The last m secant pairs of a solve, in a ring of contiguous rows, with the small matrices of their inner products.

A pair is (delta_image, delta_residual) of two consecutive states. Every quasi-Newton step here is

    z+ = f(z) - sum_j gamma_j delta_image_j

and the methods differ only in how gamma follows from inner products: a full solve with the Gram matrix of residual
differences is Anderson acceleration (type II), a solve with its upper triangle is Broyden's second method, a solve with
<step, delta_residual> and the lower triangle of <step, step> is Broyden's first method. Because each step starts from the
raw pairs, dropping the oldest one leaves no trace in the others, and the newest secant equation holds exactly for any m.

Inner products follow the scope: per unit, then summed over the units before it (`scope.accumulate`). Pairs can be
forgotten for one unit and kept for the others.

References:
    Byrd, Nocedal, Schnabel 1994, "Representations of quasi-Newton matrices", section 5 (compact form of Broyden's).
    Walker, Ni 2011, "Anderson acceleration for fixed-point iterations".
"""

from __future__ import annotations

import torch
from torch import Tensor

from deq_lm.solvers.scope import accumulate


class SecantHistory:
    """A ring of pairs of rows. Written in place: one history belongs to one solve.

    Attributes:
        rows: the two rings, (B, U, capacity, N) each.
        usable: (B, U, stored) bool, in ring order: False where a unit has forgotten a pair.
    """

    def __init__(self, like: Tensor, capacity: int) -> None:
        """Room for `capacity` pairs of states split into units, (B, U, N)."""
        num_sequences, num_units, size = like.shape
        self._capacity = capacity
        self._stored = 0
        self._newest = -1
        shape = (num_sequences, num_units, capacity, size)
        self.rows = (like.new_empty(shape), like.new_empty(shape))
        self._usable = torch.zeros(shape[:-1], dtype=torch.bool, device=like.device)

    def append(self, first: Tensor, second: Tensor) -> None:
        """Store a pair, (B, U, N) each, over the oldest one if the ring is full."""
        self._newest = (self._newest + 1) % self._capacity
        self._stored = min(self._stored + 1, self._capacity)
        self.rows[0][:, :, self._newest] = first
        self.rows[1][:, :, self._newest] = second
        self._usable[:, :, self._newest] = True

    def forget(self, units: Tensor) -> None:
        """Drop all stored pairs for the units where `units`, (B, U) bool, is True."""
        self._usable &= ~units[..., None]

    def __len__(self) -> int:
        return self._stored

    @property
    def newest(self) -> int:
        """Slot of the newest pair."""
        return self._newest

    @property
    def usable(self) -> Tensor:
        return self._usable[:, :, : self._stored]

    def products(self, ring: int, *vectors: Tensor) -> tuple[Tensor, ...]:
        """Inner products of every stored row of a ring with each vector (B, U, N), over what each unit may see.

        One pass over the ring for all vectors. Returns one (B, U, stored) for each vector.
        """
        columns = torch.stack(vectors, dim=-1)  # (B, U, N, number of vectors)
        return accumulate(self.rows[ring][:, :, : self._stored] @ columns).unbind(dim=-1)

    def combine(self, ring: int, coefficients: Tensor) -> Tensor:
        """sum_j coefficients_j row_j, (B, U, N), for coefficients (B, U, stored)."""
        return (coefficients[:, :, None, :] @ self.rows[ring][:, :, : self._stored]).squeeze(2)

    def chronological(self, matrix: Tensor, num_axes: int) -> Tensor:
        """Reorder the last `num_axes` axes of a small tensor from ring order to oldest-first."""
        return self._roll(matrix, num_axes, -(self._newest + 1))

    def ring_order(self, vector: Tensor) -> Tensor:
        """Reorder the last axis from oldest-first to ring order."""
        return self._roll(vector, 1, self._newest + 1)

    def _roll(self, tensor: Tensor, num_axes: int, shift: int) -> Tensor:
        if self._newest + 1 == self._stored:  # slots are in order of time already
            return tensor
        axes = tuple(range(-num_axes, 0))
        return tensor.roll((shift,) * num_axes, axes)


class ProductMatrix:
    """A small matrix of inner products between stored pairs, (B, U, m, m) in ring order, kept up to date row by row."""

    def __init__(self, like: Tensor, capacity: int) -> None:
        self._entries = like.new_zeros(*like.shape[:2], capacity, capacity)

    def update(self, history: SecantHistory, row: Tensor, column: Tensor) -> None:
        """Set the newest pair's row and column, (B, U, stored) each."""
        stored, newest = len(history), history.newest
        self._entries[:, :, newest, :stored] = row
        self._entries[:, :, :stored, newest] = column

    def oldest_first(self, history: SecantHistory) -> Tensor:
        """(B, U, stored, stored), oldest pair first."""
        stored = len(history)
        return history.chronological(self._entries[:, :, :stored, :stored], 2)
