"""What a coefficient may look at: a scope splits a state into units and sums over what each unit may see.

`sequence`: one unit a sequence. Inner products run over all positions, as in the papers' solvers; an unconverged iterate
at position t then depends on tokens after t.
`prefix`: one unit a position t, which stands for the prefix 0..t. Inner products at t run over positions <= t, one
cumulative sum over the position axis, so that an iterate is causal at every step count.

Everything a solver or a stopping rule computes has shape (B, U, ...), U = 1 or L, and is written once for both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deq_lm._types import Scope


def check_scope(owner: str, scope: str) -> None:
    """Raises ValueError unless `scope` is one of the two."""
    if scope not in ("prefix", "sequence"):
        raise ValueError(
            f"{owner}(scope={scope!r}): expected 'prefix' (causal at every step) or 'sequence' (the papers' method)."
        )


def split_units(z: Tensor, scope: Scope) -> Tensor:
    """View a state (B, L, ...) as units (B, U, N)."""
    return z.reshape(z.shape[0], 1, -1) if scope == "sequence" else z.reshape(z.shape[0], z.shape[1], -1)


def accumulate(local: Tensor) -> Tensor:
    """Sum what each unit may see: per-unit values (B, U, ...) to sums over units <= its own."""
    return local if local.shape[1] == 1 else local.cumsum(dim=1)


def hold(active: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """`new` where a unit is active, `old` where it is frozen; states are (B, L, ...), `active` is (B, U) or None (all)."""
    return new if active is None else torch.where(over(active, new), new, old)


def over(units: Tensor, state: Tensor) -> Tensor:
    """A value per unit, (B, U), as (B, U, 1, ...), to be broadcast over a state, or anything else with as many axes."""
    return units.reshape(*units.shape, *(1,) * (state.dim() - 2))
