"""What a segment leaves to the next one: past equilibria and the inputs they belong to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Memory:
    """Past positions a segment may attend to; never carries a gradient.

    Attributes:
        z: equilibria of the last M positions, (B, M, D).
        x: the injected inputs of the same positions, (B, M, D). Keys and values of memory are computed from both by
            the current weights, so that memory gives the same keys as the positions would have in one long segment.
    """

    z: Tensor
    x: Tensor

    @property
    def length(self) -> int:
        return self.z.shape[1]

    @staticmethod
    def extend(memory: Memory | None, z: Tensor, x: Tensor, max_length: int) -> Memory | None:
        """`memory` followed by (z, x), (B, L, D) each, detached and cut to the last `max_length` positions."""
        if max_length == 0:
            return None
        z, x = z.detach(), x.detach()
        if memory is not None:
            z, x = torch.cat([memory.z, z], dim=1), torch.cat([memory.x, x], dim=1)
        return Memory(z[:, -max_length:].contiguous(), x[:, -max_length:].contiguous())
