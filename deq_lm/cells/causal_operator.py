"""(W z)_t = W_0 z_t + sum_{k=1..K} W_k z_{t-k}: a linear map over positions, its transpose and its resolvent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class CausalOperator:
    """W, the same at every position. At padding W z is 0 and z counts as 0: P W P with the projection P on the rest.

    Attributes:
        blocks: W_0, W_1, ..., W_K side by side, (D, (K + 1) D).
        present: (B, L, 1) bool, False at padding; None if there is none.
    """

    blocks: Tensor
    present: Tensor | None = None

    @property
    def num_taps(self) -> int:
        """K."""
        width, columns = self.blocks.shape
        return columns // width - 1

    def __call__(self, z: Tensor, before: Tensor | None = None) -> Tensor:
        """W z, (B, L, D), with `before`, (B, K, D), in the place of the positions before the first; None is zeros."""
        z, num_taps, length = self._masked(z), self.num_taps, z.shape[1]
        padded = F.pad(z, (0, 0, num_taps, 0)) if before is None else torch.cat([before, z], dim=1)  # (B, K + L, D)
        shifted = [padded[:, num_taps - k : num_taps - k + length] for k in range(num_taps + 1)]
        return self._masked(F.linear(torch.cat(shifted, dim=-1), self.blocks))

    def resolvent(self, step: Tensor | float) -> CausalResolvent:
        """(I + step (I - W))^-1: its blocks are inverted here, once."""
        width = self.blocks.shape[0]
        own, taps = self.blocks[:, :width], self.blocks[:, width:]
        inverse = torch.linalg.inv((1 + step) * torch.eye(width, dtype=own.dtype, device=own.device) - step * own)
        return CausalResolvent(inverse, step * (inverse @ taps), step, self.present)

    def transposed(self) -> CausalOperator:
        """W^T, in reversed time: (W^T z)_t = W_0^T z_t + sum_k W_k^T z_{t+k}."""
        width = self.blocks.shape[0]
        blocks = torch.cat([block.T for block in self.blocks.split(width, dim=1)], dim=1)
        return CausalOperator(blocks, None if self.present is None else self.present.flip(1))

    def _masked(self, z: Tensor) -> Tensor:
        return z if self.present is None else torch.where(self.present, z, 0.0)


@dataclass(frozen=True)
class CausalResolvent:
    """(I + step (I - W))^-1 by its recurrence, z_t = V r_t + step sum_k V W_k z_{t-k} with V = (I + step (I - W_0))^-1.

    V r is one product over all positions; what is left for the recurrence is a product of (B, K D) and (K D, D) a position.

    Attributes:
        inverse: V, (D, D).
        feedback: step V W_1, ..., step V W_K side by side, (D, K D).
        step: positive.
        present: as the operator's.
    """

    inverse: Tensor
    feedback: Tensor
    step: Tensor | float
    present: Tensor | None

    def __call__(self, r: Tensor) -> Tensor:
        """(I + step (I - W))^-1 r, (B, L, D)."""
        local = F.linear(r, self.inverse)
        z = self._recurrence(local) if self.feedback.shape[1] > 0 else local
        return z if self.present is None else torch.where(self.present, z, r / (1 + self.step))

    def _recurrence(self, local: Tensor) -> Tensor:
        width, transposed = local.shape[-1], self.feedback.T
        past = local.new_zeros(local.shape[0], self.feedback.shape[1])  # z_{t-1}, ..., z_{t-K}
        states = []
        for t in range(local.shape[1]):
            z = torch.addmm(local[:, t], past, transposed)
            if self.present is not None:
                z = torch.where(self.present[:, t], z, 0.0)
            states.append(z)
            past = torch.cat([z, past[:, :-width]], dim=1)
        return torch.stack(states, dim=1)
