"""Distances between positions: sinusoids, and the shift that turns scores by distance into scores by key."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sinusoids(num_distances: int, d_model: int, like: Tensor) -> Tensor:
    """Sinusoidal embedding of the distances num_distances - 1, ..., 1, 0, as (num_distances, d_model) of `like`'s kind.

    Sines in the first half, cosines in the second; computed in float32 at least, whatever the dtype of `like`.

    References:
        Vaswani et al. 2017, section 3.5; Dai et al. 2019, "Transformer-XL", section 3.3.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    distance = torch.arange(num_distances - 1, -1, -1, dtype=dtype, device=like.device)
    exponent = torch.arange(0, d_model, 2, dtype=dtype, device=like.device) / d_model
    angle = distance[:, None] * torch.exp(-math.log(10000.0) * exponent)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)[:, :d_model].to(like.dtype)


def by_key(scores: Tensor) -> Tensor:
    """Scores by distance (..., L, K + 1), one unused column at the end, to scores by key (..., L, K).

    Column c of the input is for distance K - 1 - c, and key j is at distance i + (K - L) - j from query i, so that
    out[i, j] = scores[i, j + L - 1 - i]: read row by row with K columns instead of K + 1, an index without arithmetic.
    Entries of keys after the query hold unrelated numbers and must be masked.
    """
    length, num_keys = scores.shape[-2], scores.shape[-1] - 1
    return scores.flatten(-2)[..., length - 1 : length - 1 + length * num_keys].unflatten(-1, (length, num_keys))
