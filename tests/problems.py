"""Maps with a known fixed point: what every solver is tried on. States are (B, L, D), all float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """f and its fixed point. `causal`: position t of f(z) depends on positions <= t of z."""

    name: str
    f: Callable[[Tensor], Tensor]
    z_star: Tensor
    is_contraction: bool
    causal: bool = True

    @property
    def z0(self) -> Tensor:
        return torch.zeros_like(self.z_star)

    def __repr__(self) -> str:
        return self.name


def causal_matrix(length: int, width: int, seed: int) -> Tensor:
    """A random block lower triangular matrix, (L D, L D)."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(length * width, length * width, dtype=torch.float64, generator=generator)
    return matrix * torch.kron(torch.ones(length, length).tril(), torch.ones(width, width)).double()


def linear_map(matrix: Tensor, offset: Tensor) -> Callable[[Tensor], Tensor]:
    """z -> A z + b on flattened sequences, each on its own, so that rounding does not depend on the batch size."""
    return lambda z: torch.stack([(matrix @ one.flatten()).view_as(one) for one in z]) + offset[: z.shape[0]]


def linear(
    name: str, spectral_radius: float, *, batch: int = 3, length: int = 4, width: int = 5, seed: int = 0
) -> Problem:
    matrix = causal_matrix(length, width, seed)
    matrix = matrix * (spectral_radius / torch.linalg.eigvals(matrix).abs().max())
    return _with_offset(name, matrix, batch, length, width, seed, is_contraction=spectral_radius < 0.95)


def non_normal(*, batch: int = 3, length: int = 4, width: int = 5, seed: int = 1) -> Problem:
    """Spectral radius 0.5, but couplings to earlier positions 20 times that."""
    matrix = causal_matrix(length, width, seed)
    matrix = 0.5 * matrix / torch.linalg.eigvals(matrix).abs().max()
    diagonal_blocks = torch.kron(torch.eye(length), torch.ones(width, width)).bool()
    return _with_offset(
        "non-normal",
        torch.where(diagonal_blocks, matrix, 3.0 * matrix),
        batch,
        length,
        width,
        seed,
        is_contraction=True,
    )


def rotation(*, batch: int = 2, length: int = 3) -> Problem:
    """A rotation by 80 degrees, scaled by 1.05: Picard spirals out."""
    angle = torch.tensor(80.0, dtype=torch.float64).deg2rad()
    block = 1.05 * torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    matrix = torch.kron(torch.eye(length, dtype=torch.float64), block)
    return _with_offset("rotation", matrix, batch, length, 2, 3, is_contraction=False)


def tanh(*, batch: int = 3, length: int = 4, width: int = 5, seed: int = 2) -> Problem:
    """z -> tanh(A z + b), with b chosen for a known z*."""
    matrix = causal_matrix(length, width, seed)
    matrix = 0.9 * matrix / torch.linalg.matrix_norm(matrix, 2)
    generator = torch.Generator().manual_seed(seed)
    z_star = 1.6 * torch.rand(batch, length, width, dtype=torch.float64, generator=generator) - 0.8
    offset = z_star.atanh() - (z_star.flatten(1) @ matrix.T).view_as(z_star)
    affine = linear_map(matrix, offset)
    return Problem("tanh", lambda z: affine(z).tanh(), z_star, is_contraction=True)


def solution_at_zero(*, batch: int = 2, length: int = 4, width: int = 3) -> Problem:
    """z -> 0.5 sin(z): the fixed point is the origin, where a relative tolerance alone can never be met."""
    z_star = torch.zeros(batch, length, width, dtype=torch.float64)
    return Problem("solution at zero", lambda z: 0.5 * z.sin(), z_star, is_contraction=True)


def all_problems() -> list[Problem]:
    return [
        linear("linear 0.5", 0.5),
        linear("linear 0.9", 0.9),
        linear("linear 0.99", 0.99),
        non_normal(),
        rotation(),
        tanh(),
    ]


def _with_offset(
    name: str, matrix: Tensor, batch: int, length: int, width: int, seed: int, *, is_contraction: bool
) -> Problem:
    """z -> A z + b, with b chosen for a z* of size 1."""
    generator = torch.Generator().manual_seed(seed)
    z_star = torch.randn(batch, length, width, dtype=torch.float64, generator=generator)
    offset = z_star - (z_star.flatten(1) @ matrix.T).view_as(z_star)
    return Problem(name, linear_map(matrix, offset), z_star, is_contraction=is_contraction)
