"""What a segment leaves to the next one: past equilibria and the inputs they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Memory:
    """Past positions a segment may attend to; never carries a gradient.

    Attributes:
        z: equilibria of the last M positions, (B, M, D). Of several blocks, what each was given, side by side.
        x: the injected inputs of the same positions, (B, M, D). Keys and values of memory are computed from both by
            the current weights, so that memory gives the same keys as the positions would have in one long segment.
        mask: (B, M) bool, False at padding, which is not attended to; None if there is none.
    """

    z: Tensor
    x: Tensor
    mask: Tensor | None = None

    @property
    def length(self) -> int:
        return self.z.shape[1]

    @staticmethod
    def extend(memory: Memory | None, z: Tensor, x: Tensor, max_length: int) -> Memory | None:
        """`memory` followed by (z, x), (B, L, D) each, detached and cut to the last `max_length` positions."""
        if max_length == 0:
            return None
        z, x, mask = z.detach(), x.detach(), None
        if memory is not None:
            if memory.mask is not None:
                mask = F.pad(memory.mask, (0, z.shape[1]), value=True)[:, -max_length:].contiguous()
            z, x = torch.cat([memory.z, z], dim=1), torch.cat([memory.x, x], dim=1)
        return Memory(z[:, -max_length:].contiguous(), x[:, -max_length:].contiguous(), mask)

    def parts(self, num_blocks: int) -> list[Memory]:
        """The memory of each block, of a memory that has `z` of all of them side by side."""
        return [replace(self, z=z) for z in self.z.chunk(num_blocks, dim=-1)]

    @staticmethod
    def joined(parts: Sequence[Memory | None]) -> Memory | None:
        """The inverse of `parts`: one memory, of memories of the same positions; None if there are none."""
        memories = [part for part in parts if part is not None]
        return replace(memories[0], z=torch.cat([memory.z for memory in memories], dim=-1)) if memories else None

    def share(self, rank: int, num_ranks: int) -> Memory:
        """Of all streams, those of one process: `num_ranks` equal shares in order."""
        size = len(self.z) // num_ranks
        own = slice(rank * size, (rank + 1) * size)
        return Memory(self.z[own], self.x[own], None if self.mask is None else self.mask[own])

    def mark_padding(self, key_mask: Tensor) -> Memory:
        """The same memory, of whose newest positions those are padding where `key_mask`, (B, L) bool, is False."""
        earlier = self.length - key_mask.shape[1]  # below 0, the oldest positions of the segment are not in memory
        mask = F.pad(key_mask, (earlier, 0), value=True)
        return replace(self, mask=mask if self.mask is None else mask & self.mask)
