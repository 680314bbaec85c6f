"""LearnedStart: a cheap proposal of where a solve begins, z0 = W x + b at each position."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LearnedStart(nn.Module):
    """Reads the injected input of one position at a time, so that it is causal and the same for any cut of a text.

    It begins at 0, where a solve without it does. An equilibrium's gradient does not reach its start, so the proposal
    learns by a regression of its own, `error`, which in turn reaches nothing else: the model learns as it would without.

    References:
        Bai, Koltun, Kolter 2022, "Neural deep equilibrium solvers", section 4.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, width))
        self.bias = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All 0."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """z0 for the injected input x, (B, L, D) both; no gradient reaches x."""
        return F.linear(x.detach(), self.weight, self.bias)

    @staticmethod
    def error(proposed: Tensor, z: Tensor) -> Tensor:
        """||z0 - z*||^2 / ||z*||^2 of each sequence, their mean, 0-dim; 1 where z0 is 0. No gradient reaches z*.

        Of a sequence whose z* is 0 (a sparse cell's may be) it is ||z0||^2: relative to 0 it would have no finite gradient.
        """
        z = z.detach()
        difference = (proposed - z).flatten(1).square().sum(dim=1)  # (B,)
        size = z.flatten(1).square().sum(dim=1)
        return (difference / torch.where(size > 0, size, 1.0)).mean()
