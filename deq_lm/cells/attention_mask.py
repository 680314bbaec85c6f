"""Who may look at whom: itself and what is before it, be it in memory or in the segment, and never padding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from deq_lm.cells.memory import Past


def attention_mask(x: Tensor, memory: Past | None, key_mask: Tensor | None, window: int | None = None) -> Tensor:
    """0 where a query may look and -inf elsewhere, (L, K) or (B, L, K); every query sees itself, so no row is empty."""
    (batch, length), past = x.shape[:2], 0 if memory is None else memory.length
    visible = torch.ones(length, past + length, dtype=torch.bool, device=x.device).tril(past)
    if window is not None:
        visible = visible.triu(past - window + 1)
    past_mask = None if memory is None else memory.mask
    if key_mask is not None or past_mask is not None:
        itself = torch.zeros_like(visible).diagonal_scatter(visible.new_ones(length), past)
        present = [  # (B, M) and (B, L)
            x.new_ones(batch, num, dtype=torch.bool) if mask is None else mask
            for mask, num in ((past_mask, past), (key_mask, length))
        ]
        visible = (visible & torch.cat(present, dim=1)[:, None, :]) | itself
    return torch.zeros(visible.shape, dtype=x.dtype, device=x.device).masked_fill(~visible, -math.inf)
