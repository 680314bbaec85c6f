"""Spectral norms bounded from above; a power iteration bounds them from below, which proves nothing."""

from __future__ import annotations

import torch
from torch import Tensor

SQUARINGS = 5


def spectral_norm_bound(matrix: Tensor) -> Tensor:
    """At least the spectral norm of (..., R, C), and at most rank^(1 / 128) times it (1.05 for rank 512): (...).

    With G = V^T V and q = 2^5: ||V||_2^2 = ||G||_2 <= ||G^q||_F^(1/q) <= (sqrt(rank) ||G||_2^q)^(1/q), by squaring G five
    times. Matrix products alone, no decomposition; differentiable, also at zero; positively homogeneous at any scale.
    """
    tiny, eps = torch.finfo(matrix.dtype).tiny, torch.finfo(matrix.dtype).eps

    def size(x: Tensor, dim: tuple[int, int] = (-2, -1)) -> Tensor:
        return x.detach().abs().amax(dim=dim, keepdim=True).clamp_min(tiny)

    # What is divided out and multiplied back is a constant to autograd: the value does not depend on it.
    scale = size(matrix)
    gram = (matrix / scale).mT @ (matrix / scale)
    for i in range(SQUARINGS + 1):
        if i > 0:
            gram = gram @ gram
        divisor = size(gram)
        gram = gram / divisor
        scale = scale * divisor ** (0.5 / 2**i)
    power = torch.linalg.matrix_norm(gram).clamp_min(tiny) ** (0.5 / 2**SQUARINGS)
    return scale[..., 0, 0] * power * (1 + 16 * eps)  # above it after rounding, too
