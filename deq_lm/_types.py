"""Axis names used in shape comments, and the few type aliases.

| letter | axis |
|---|---|
| B | batch: sequences, or parallel streams of text |
| L | positions of the current segment |
| M | positions held in memory, before the segment |
| K | keys: M + L |
| D | d_model |
| H, E | heads, and the width of one head (D = H * E) |
| U | units of a solve: 1 (the whole sequence) or L (every causal prefix) |
| N | numbers in one unit: L * D or D |
| m | stored pairs of a solver's history |
| V | vocabulary |
"""

from collections.abc import Callable
from typing import Literal

from torch import Tensor

FixedPointMap = Callable[[Tensor], Tensor]
"""z -> f(z), shape (B, L, D) to the same shape."""

Scope = Literal["prefix", "sequence"]
"""What a coefficient of a solver may look at: the positions up to its own, or all of them."""
