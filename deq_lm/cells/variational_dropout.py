"""Variational dropout: one mask a solve, shared by all positions and all evaluations."""

from __future__ import annotations

import torch
from torch import Tensor


def variational_mask(x: Tensor, probability: float) -> Tensor:
    """An inverted-dropout mask (B, 1, D) for x, (B, L, D): 0 with `probability`, otherwise 1 / (1 - probability).

    References:
        Gal, Ghahramani 2016; Bai, Kolter, Koltun 2019, appendix (the mask is part of f, so that f has a fixed point).
    """
    keep = torch.rand(x.shape[0], 1, x.shape[2], device=x.device) >= probability
    return keep.to(x.dtype) / (1.0 - probability)
