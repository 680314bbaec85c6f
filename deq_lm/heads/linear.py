"""The linear head: nats of targets from hidden states, a chunk of positions at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deq_lm.heads.base import Head, Reduction

IGNORED = -100
"""A target that is not scored."""

MAX_LOGITS = 2**24
"""Logits that may exist at once where the caller does not say: 64 MiB of float32. Larger chunks were slower, too."""


class LinearHead(nn.Linear, Head):
    """logits = W h, with W, (V, D), the table of the input embedding unless the model is told not to tie them."""

    ties: ClassVar[Mapping[str, str]] = {"weight": "weight"}

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__(d_model, vocab_size, bias=False)

    def nll(
        self, hidden: Tensor, targets: Tensor, embedding: nn.Module, *, reduction: Reduction = "sum"
    ) -> tuple[Tensor, Tensor]:
        return token_nll(hidden, self.weight, targets, reduction=reduction)

    def logits(self, hidden: Tensor, embedding: nn.Module) -> Tensor:
        return self(hidden)


def token_nll(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    chunk_positions: int | None = None,
    reduction: Reduction = "sum",
) -> tuple[Tensor, Tensor]:
    """-log softmax(hidden weight^T + bias)[target] in nats, summed over scored targets, and how many were scored.

    The logits of more than `chunk_positions` positions never exist at once: the backward pass computes each chunk's anew.

    Args:
        hidden: (B, L, D), or (N, D).
        weight: output embedding, (V, D).
        targets: (B, L) or (N,) int64; -100 is not scored.
        bias: (V,), if there is one.
        chunk_positions: positions per chunk, 1 or more; None takes as many as have `MAX_LOGITS` logits.
        reduction: "none" leaves the nats of each target apart, with 0 where it is not scored.

    Returns:
        The sum, 0-dim, or the nats, of the shape of `targets`, float32 at least; the count, 0-dim int64.

    Raises:
        ValueError: if chunk_positions is below 1.
    """
    if chunk_positions is None:
        chunk_positions = max(1, MAX_LOGITS // len(weight))
    if chunk_positions < 1:
        raise ValueError(
            f"token_nll(chunk_positions={chunk_positions}): expected 1 or more, or None to choose by size."
        )
    rows, flat_targets = hidden.flatten(0, -2), targets.flatten()
    if len(rows) <= chunk_positions:
        nats = _chunk_nll(rows, weight, bias, flat_targets, reduction)
    else:
        chunks = [  # nothing random inside, so no generator state to keep
            checkpoint(
                _chunk_nll, chunk, weight, bias, target, reduction, use_reentrant=False, preserve_rng_state=False
            )
            for chunk, target in zip(rows.split(chunk_positions), flat_targets.split(chunk_positions), strict=True)
        ]
        # checkpoint returns what it is given, which its types do not say
        nats = torch.stack(chunks).sum() if reduction == "sum" else torch.cat(chunks)  # pyright: ignore[reportArgumentType]
    return nats if reduction == "sum" else nats.view_as(targets), (targets != IGNORED).sum()


def _chunk_nll(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, reduction: Reduction) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction=reduction)
