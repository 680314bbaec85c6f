"""Random contractions, for property tests: z -> activation(A z + x) with a causal A of known norm. States are (B, L, D)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from problems import causal_matrix
from torch import Tensor


@dataclass(frozen=True)
class Contraction:
    """f, with A and x as what it reads besides z.

    Evaluated position by position with products whose shape and order do not depend on batch or length, so that the image
    of a sequence, or of a prefix, is the same to the last bit in whatever company.

    Attributes:
        blocks: A as (L, D, L, D), zero where the second position is after the first; spectral norm `norm`.
        x: (B, L, D).
        norm: below 0.95; no activation makes it larger.
        activation: "affine" or "tanh".
    """

    blocks: Tensor
    x: Tensor
    norm: float
    activation: str

    def __repr__(self) -> str:
        return f"Contraction({self.activation}, {tuple(self.x.shape)}, norm={self.norm:.2f}, {self.x.dtype})"

    def __call__(self, z: Tensor) -> Tensor:
        rows = []
        for t in range(z.shape[1]):
            row = self.x[:, t]
            for s in range(t + 1):  # sum over D alone, for every position before
                row = row + (self.blocks[t, :, s] * z[:, s, None]).sum(dim=-1)
            rows.append(row)
        image = torch.stack(rows, dim=1)
        return image.tanh() if self.activation == "tanh" else image

    @property
    def z0(self) -> Tensor:
        return torch.zeros_like(self.x)

    @property
    def z_star(self) -> Tensor:
        """The fixed point of an affine map, by elimination in float64."""
        assert self.activation == "affine"
        matrix = self.blocks.double().flatten(2).flatten(0, 1)
        identity = torch.eye(len(matrix), dtype=torch.float64)
        return torch.linalg.solve(identity - matrix, self.x.double().flatten(1).T).T.view_as(self.x)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (self.blocks, self.x)

    def with_inputs(self, inputs: Sequence[Tensor]) -> Contraction:
        blocks, x = inputs
        return replace(self, blocks=blocks, x=x)

    def to(self, dtype: torch.dtype) -> Contraction:
        return self.with_inputs((self.blocks.to(dtype), self.x.to(dtype)))

    def of_batch(self, entries: Tensor) -> Contraction:
        """The map of some sequences, in this order."""
        return self.with_inputs((self.blocks, self.x[entries]))

    def of_prefix(self, length: int) -> Contraction:
        """The map of the first positions."""
        return self.with_inputs((self.blocks[:length, :, :length], self.x[:, :length]))


def contractions(*activations: str, min_length: int = 1) -> st.SearchStrategy[Contraction]:
    """Of all sizes from a single number up, in float64; both activations by default."""

    def make(activation: str, batch: int, length: int, width: int, norm: float, seed: int) -> Contraction:
        matrix = causal_matrix(length, width, seed)
        matrix = norm * matrix / torch.linalg.matrix_norm(matrix, 2)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(batch, length, width, dtype=torch.float64, generator=generator)
        return Contraction(matrix.view(length, width, length, width), x, norm, activation)

    return st.builds(
        make,
        activation=st.sampled_from(activations or ("affine", "tanh")),
        batch=st.integers(1, 4),
        length=st.integers(min_length, 5),
        width=st.integers(1, 8),
        norm=st.floats(0.0, 0.94),
        seed=st.integers(0, 2**16),
    )
