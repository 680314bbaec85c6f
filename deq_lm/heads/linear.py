"""The linear head: nats of targets from hidden states, a chunk of positions at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED = -100
"""A target that is not scored."""

MAX_LOGITS = 2**24
"""Logits that may exist at once where the caller does not say: 64 MiB of float32. Larger chunks were slower, too."""


def token_nll(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk_positions: int | None = None
) -> tuple[Tensor, Tensor]:
    """Sum of -log softmax(hidden weight^T)[target] in nats over scored targets, and how many were scored.

    The logits of more than `chunk_positions` positions never exist at once: the backward pass computes each chunk's anew.

    Args:
        hidden: (B, L, D).
        weight: output embedding, (V, D).
        targets: (B, L) int64; -100 is not scored.
        chunk_positions: positions per chunk, 1 or more; None takes as many as have `MAX_LOGITS` logits.

    Returns:
        The sum, 0-dim, float32 at least; the count, 0-dim int64.

    Raises:
        ValueError: if chunk_positions is below 1.
    """
    if chunk_positions is None:
        chunk_positions = max(1, MAX_LOGITS // len(weight))
    if chunk_positions < 1:
        raise ValueError(
            f"token_nll(chunk_positions={chunk_positions}): expected 1 or more, or None to choose by size."
        )
    rows, flat_targets = hidden.flatten(0, 1), targets.flatten()
    if len(rows) <= chunk_positions:
        total = _chunk_nll(rows, weight, flat_targets)
    else:
        sums = [  # nothing random inside, so no generator state to keep
            checkpoint(_chunk_nll, chunk, weight, target, use_reentrant=False, preserve_rng_state=False)
            for chunk, target in zip(rows.split(chunk_positions), flat_targets.split(chunk_positions), strict=True)
        ]
        total = torch.stack(sums).sum()  # pyright: ignore[reportArgumentType]  (checkpoint returns what it is given)
    return total, (targets != IGNORED).sum()


def _chunk_nll(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
