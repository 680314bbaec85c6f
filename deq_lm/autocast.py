"""The autocast state as a value: read where a map is made, entered wherever it is evaluated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Autocast:
    """The autocast state of one moment, to be entered again later (in a backward pass, say)."""

    device_type: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def current(cls, device_type: str) -> Autocast:
        return cls(device_type, torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type))

    def enter(self) -> torch.autocast:
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled)

    def convert(self, weight: Tensor) -> Tensor:
        """`weight` in the dtype a matrix product would convert it to, so that this happens once and not per evaluation."""
        return weight.to(self.dtype) if self.enabled and weight.dtype == torch.float32 else weight


class KnownPrecision:
    """A map that says what it computes in, whatever dtype its values have and autocast state there is where it is called.

    Attributes:
        dtype: of its weights and what it makes of them.
        autocast: under which it evaluates.
    """

    dtype: torch.dtype
    autocast: Autocast
