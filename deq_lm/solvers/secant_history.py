"""The memory of a quasi-Newton solver: rings of the newest rows, and small matrices of their inner products.

A ring is laid out slot by slot, (capacity, B, U, N), so that a row is written, and read, as one contiguous block; nothing
is sized by the step budget.
"""

from __future__ import annotations

import torch
from torch import Tensor


class SecantHistory:
    """Rings of rows that advance together. Written in place: one history belongs to one solve.

    Attributes:
        rings: (capacity, B, U, N) each.
    """

    def __init__(self, like: Tensor, capacity: int, *, num_rings: int, half_precision: bool) -> None:
        """Room for `capacity` rows of states split into units, (B, U, N), in each ring; in bfloat16, or as wide as they."""
        dtype = torch.bfloat16 if half_precision else like.dtype
        self.rings = tuple(like.new_empty((capacity, *like.shape), dtype=dtype) for _ in range(num_rings))
        self._usable = torch.zeros((*like.shape[:2], capacity), dtype=torch.bool, device=like.device)
        self._capacity = capacity
        self._stored = 0
        self._newest = -1

    def advance(self) -> tuple[Tensor, ...]:
        """Claim a slot, the oldest one's if the rings are full; returns its row in each ring, (B, U, N), to be written."""
        self._newest = (self._newest + 1) % self._capacity
        self._stored = min(self._stored + 1, self._capacity)
        self._usable[:, :, self._newest] = True
        return tuple(ring[self._newest] for ring in self.rings)

    def forget(self, units: Tensor) -> None:
        """Drop all stored rows for the units where `units`, (B, U) bool, is True."""
        self._usable &= ~units[..., None]

    def clear(self) -> None:
        """Drop all stored rows, for all units."""
        self._stored, self._newest = 0, -1

    @property
    def is_full(self) -> bool:
        """Whether the next `advance` drops the oldest rows."""
        return self._stored == self._capacity

    def __len__(self) -> int:
        return self._stored

    @property
    def newest(self) -> int:
        """Slot of the newest rows."""
        return self._newest

    @property
    def usable(self) -> Tensor:
        """Which slots a unit has not forgotten, (B, U, stored) bool."""
        return self._usable[:, :, : self._stored]

    def products(self, ring: int, vector: Tensor) -> Tensor:
        """Inner products of every stored row of a ring with a vector (B, U, N), in each unit by itself: (B, U, m)."""
        rows = self.rings[ring][: self._stored]
        if self._row_by_row(rows, vector):
            return torch.stack([(row * vector).sum(dim=-1) for row in rows], dim=-1)
        return (vector[:, :, None, :] @ rows.permute(1, 2, 3, 0)).squeeze(2)

    def combine_(self, out: Tensor, ring: int, coefficients: Tensor) -> Tensor:
        """Add sum_j coefficients_j row_j to `out`, (B, U, N), in place, for coefficients (B, U, m)."""
        rows = self.rings[ring][: self._stored]
        if self._row_by_row(rows, out):
            for row, coefficient in zip(rows, coefficients.unbind(dim=-1), strict=True):
                out.addcmul_(row, coefficient[..., None])
            return out
        return out.add_((coefficients[:, :, None, :] @ rows.permute(1, 2, 0, 3)).squeeze(2))

    @staticmethod
    def _row_by_row(rows: Tensor, vector: Tensor) -> bool:
        """Rather than by a matrix product: a CPU's is several times slower on matrices so flat, and one of rows in half
        precision would need all of them widened at once.
        """
        return vector.device.type == "cpu" or rows.dtype != vector.dtype

    def oldest_first(self, tensor: Tensor, num_axes: int = 1) -> Tensor:
        """Reorder the last `num_axes` axes of a small tensor from slots to oldest-first."""
        return self._roll(tensor, num_axes, -(self._newest + 1))

    def slots(self, tensor: Tensor) -> Tensor:
        """Reorder the last axis from oldest-first to slots."""
        return self._roll(tensor, 1, self._newest + 1)

    def _roll(self, tensor: Tensor, num_axes: int, shift: int) -> Tensor:
        if self._newest + 1 == self._stored:  # slots are in order of time already
            return tensor
        return tensor.roll((shift,) * num_axes, tuple(range(-num_axes, 0)))


class ProductMatrix:
    """Inner products of the rows of one ring with those of another, (B, U, m, m), kept up to date row by row."""

    def __init__(self, like: Tensor, capacity: int) -> None:
        self._entries = like.new_zeros((*like.shape[:2], capacity, capacity))

    def update(self, history: SecantHistory, row: Tensor, column: Tensor) -> None:
        """Set the products of the first ring's newest row, and those with the second's, (B, U, stored) each, by slots."""
        stored, newest = len(history), history.newest
        self._entries[:, :, :stored, newest] = column
        self._entries[:, :, newest, :stored] = row

    def oldest_first(self, history: SecantHistory) -> Tensor:
        """(B, U, stored, stored), oldest row first."""
        stored = len(history)
        return history.oldest_first(self._entries[:, :, :stored, :stored], 2)
