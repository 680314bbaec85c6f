"""Norms of what a unit stands for, and the only epsilon of the package: the rounding of a dtype, always relative."""

from __future__ import annotations

import torch
from torch import Tensor

from deq_lm._types import Scope
from deq_lm.solvers.scope import accumulate, split_units


def unit_norm(z: Tensor, scope: Scope) -> Tensor:
    """Euclidean norm over what each unit may see, (B, U): of the sequence, or of each prefix (so it grows along U)."""
    local = torch.linalg.vector_norm(split_units(z, scope), dim=-1)
    return local if local.shape[1] == 1 else accumulate(local.square()).sqrt()


def unit_magnitude(z: Tensor, scope: Scope) -> Tensor:
    """Largest absolute value among each unit's own entries, (B, U)."""
    return split_units(z, scope).abs().amax(dim=-1)


def relative(norm: Tensor, scale: Tensor) -> Tensor:
    """norm / scale, and 0 where both are 0 (a solution at the origin is solved exactly)."""
    return torch.where(norm == 0, torch.zeros_like(norm), norm / scale)


def spacing(dtype: torch.dtype) -> float:
    """Distance between neighbouring numbers of this dtype, relative to their size."""
    return torch.finfo(dtype).eps


def rounding(dtype: torch.dtype) -> float:
    """Relative size below which a difference of two vectors of this dtype is noise."""
    return 8 * spacing(dtype)
