"""The monotone cell: z = prox_h(W z + u) with I - W >= m I by construction, so that there is one equilibrium, always."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deq_lm.autocast import Autocast
from deq_lm.cells.attention_mask import attention_mask
from deq_lm.cells.base import BoundCell, Cell, CellConfig, check_inputs
from deq_lm.cells.causal_operator import CausalOperator
from deq_lm.cells.memory import Past, known_weights
from deq_lm.cells.norm_bound import spectral_norm_bound
from deq_lm.cells.prox import Prox, relu, soft_threshold, tanh
from deq_lm.cells.proximal_map import ProximalMap
from deq_lm.cells.relative_position import by_key, sinusoids
from deq_lm.errors import UnusedSettingWarning


@dataclass(frozen=True, kw_only=True)
class MonotoneConfig(CellConfig):
    """Sizes and variants of the cell, beside those of every cell.

    Attributes:
        num_heads: heads of the attention over the inputs; d_model is divisible by it.
        num_taps: K, earlier states that a position reads; 0 leaves each to itself.
        margin: m, above 0. The larger, the faster a solve and the weaker what a state can say to itself.
        max_feedback: c, what the norms of A^T A and of B - B^T are held below, each by scaling, so that
            L <= m + 2 delta + 2 c: one number of steps is enough for all weights, and training cannot make solves slow.
            None is no limit.
        min_mixing, max_mixing: range of delta, what the norms of W_1, ..., W_K may add up to; delta is learned in it.
        prox: the activation: "relu", "soft_threshold" or "tanh".
        threshold: of "soft_threshold", 0 or more.

    Raises:
        ValueError: if a value is out of range.
    """

    num_heads: int = 4
    num_taps: int = 4
    margin: float = 0.5
    max_feedback: float | None = 1.0
    min_mixing: float = 0.05
    max_mixing: float = 1.0
    prox: Literal["relu", "soft_threshold", "tanh"] = "relu"
    threshold: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_heads < 1 or self.d_model % self.num_heads:
            raise ValueError(
                f"d_model={self.d_model} is not divisible by num_heads={self.num_heads}: every head gets an equal share."
            )
        if self.num_taps < 0:
            raise ValueError(f"num_taps={self.num_taps}: expected 0 (each position on its own) or more.")
        if not self.margin > 0.0:
            raise ValueError(
                f"margin={self.margin}: expected a value above 0; it is what makes the equilibrium unique."
            )
        if self.max_feedback is not None and not self.max_feedback > 0.0:
            raise ValueError(f"max_feedback={self.max_feedback}: expected a value above 0, or None for no limit.")
        if not 0.0 < self.min_mixing <= self.max_mixing:
            raise ValueError(
                f"min_mixing={self.min_mixing}, max_mixing={self.max_mixing}: expected 0 < min_mixing <= max_mixing; to "
                "mix no positions set num_taps=0."
            )
        if self.prox not in ("relu", "soft_threshold", "tanh"):
            raise ValueError(f"prox={self.prox!r}: expected 'relu', 'soft_threshold' or 'tanh'.")
        if not self.threshold >= 0.0:
            raise ValueError(f"threshold={self.threshold}: expected 0 or more.")
        if self.prox != "soft_threshold" and self.threshold != type(self).threshold:
            warnings.warn(
                f"threshold={self.threshold} with prox={self.prox!r}: no effect; it is of 'soft_threshold'.",
                UnusedSettingWarning,
                stacklevel=3,
            )

    @property
    def has_proximal_form(self) -> bool:
        return self.num_blocks == 1  # a chain of such maps is none

    @property
    def activation(self) -> Prox:
        """prox_{step h} of this cell's h."""
        if self.prox == "soft_threshold":
            return partial(soft_threshold, threshold=self.threshold)
        return {"relu": relu, "tanh": tanh}[self.prox]


@dataclass(frozen=True, kw_only=True)
class BoundMonotoneCell(BoundCell):
    """f that also offers its parts.

    Attributes:
        activation, margin, lipschitz: as `ProximalMap` has them.
    """

    activation: Prox
    margin: float
    lipschitz: Tensor

    @property
    def proximal_form(self) -> ProximalMap:
        """f by its parts; it computes as f does, and reads the same tensors."""
        operator = CausalOperator(self.tensors["blocks"], self.tensors.get("present"))
        return ProximalMap(operator, self.tensors["injection"], self.activation, self.margin, self.lipschitz)


class MonotoneCell(Cell):
    """f(z)_t = prox_h(W_0 z_t + sum_{k=1..K} W_k z_{t-k} + u_t), where u is made of the inputs alone, once per solve:

        u = U LN(x + attention(x)) + b,

    with causal relative attention over the inputs of memory and segment, and

        W_0 = (1 - m - delta) I - A^T A + B - B^T,    sum_k ||W_k||_2 <= delta.

    The parameters are A, B, V_1, ..., V_K and delta's logit; W_k = V_k min(1, delta / sum_j n(V_j)) with n at least the
    spectral norm (`spectral_norm_bound`), and A^T A and B - B^T are likewise scaled to norms of `max_feedback` at most.
    States before the segment, z_{t-k} for t < k, are memory's, constant in a solve.

    *I - W >= m I, for every sequence.* Let z be a sequence of any length, z_t = 0 outside of it. The skew part B - B^T adds
    nothing to <z_t, W_0 z_t>, and -<z_t, A^T A z_t> = -||A z_t||^2 <= 0. For each k, by Cauchy and Schwarz and because a
    shift does not enlarge a norm,

        sum_t <z_t, W_k z_{t-k}> <= ||W_k|| sum_t ||z_t|| ||z_{t-k}|| <= ||W_k|| ||z||^2.

    Together <z, W z> <= (1 - m - delta) ||z||^2 + delta ||z||^2 = (1 - m) ||z||^2. The sequence may begin in memory: with
    states of memory held constant, W of the segment is the compression P W P to the segment's positions, P a coordinate
    projection, and <z, P W P z> = <P z, W P z> <= (1 - m) ||P z||^2; so it is at padding, too, where P drops the padded
    positions and f is 0. None of this looks at a token: m is a constant, and the same for every prefix.

    *One equilibrium.* z = prox_h(W z + u) says 0 in (I - W) z - u + dh(z), a sum of a strongly monotone Lipschitz map and
    a maximal monotone one: it has one solution, whatever u. And from m ||e||^2 <= <e, (I - W) e> and the monotonicity of
    dh, a state with residual r = f(z) - z is within ||r|| (1 + L) / m of it, L >= ||I - W||: here

        ||I - W|| <= n(I - W_0) + sum_k ||W_k||.

    f computes in float32 at least, also under autocast, so that its parts fit together; they are small beside attention.

    References:
        Winston, Kolter 2020, "Monotone operator equilibrium networks" (K = 0, no attention, one vector for a sequence).
    """

    def __init__(self, config: MonotoneConfig) -> None:
        super().__init__(config)
        self.config = config
        width = config.d_model
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.distance = nn.Linear(width, width, bias=False)
        self.merge = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.inject = nn.Linear(width, width)  # U, b
        self.damping = nn.Parameter(torch.empty(width, width))  # A
        self.rotation = nn.Parameter(torch.empty(width, width))  # B
        self.taps = nn.Parameter(torch.empty(config.num_taps, width, width))  # V
        self.mixing_logit = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for module in self.children():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=self.config.init_std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for matrix in (self.damping, self.rotation, self.taps):
            nn.init.normal_(matrix, std=self.config.init_std)
        nn.init.zeros_(self.mixing_logit)
        self.norm.reset_parameters()

    @property
    def mixing(self) -> Tensor:
        """delta, 0-dim."""
        lowest, highest = self.config.min_mixing, self.config.max_mixing
        return lowest + (highest - lowest) * self.mixing_logit.sigmoid()

    def operator(self) -> tuple[Tensor, Tensor]:
        """W_0, ..., W_K side by side, (D, (K + 1) D), and the bound L of ||I - W||, which carries no gradient."""
        dtype = torch.promote_types(self.damping.dtype, torch.float32)
        damping, rotation, taps = (p.to(dtype) for p in (self.damping, self.rotation, self.taps))
        mixing = self.mixing.to(dtype)
        identity = torch.eye(len(damping), dtype=dtype, device=damping.device)
        symmetric, skew = damping.T @ damping, rotation - rotation.T
        limit = self.config.max_feedback
        if limit is not None:
            symmetric, skew = (part * _shrink(spectral_norm_bound(part), limit) for part in (symmetric, skew))
        own = (1 - self.config.margin - mixing) * identity - symmetric + skew
        total = spectral_norm_bound(taps).sum()
        share = _shrink(total, mixing)
        with torch.no_grad():
            lipschitz = spectral_norm_bound(identity - own) + share * total
        # side by side, also where there are none: parameters without a gradient would stop DDP
        return torch.cat([own, (share * taps).transpose(0, 1).flatten(1)], dim=1), lipschitz

    @property
    def num_visible(self) -> int:
        return max(super().num_visible, self.config.num_taps)

    def bind(
        self, x: Tensor, memory: Past | None = None, key_mask: Tensor | None = None, *, sliding: bool = False
    ) -> BoundMonotoneCell:
        check_inputs(self.config.d_model, 3 * self.config.d_model, x, memory, key_mask)
        device_type = x.device.type
        weights = known_weights(memory)
        if not weights:
            with torch.autocast(device_type, enabled=False):
                blocks, lipschitz = self.operator()
            weights = {"blocks": blocks, "lipschitz": lipschitz}
        blocks = weights["blocks"]
        past = None if memory is None else memory.project(self.project, weights)
        window = self.num_visible + 1 if sliding else None
        content = self._content(x, past, attention_mask(x, memory, key_mask, window))
        with torch.autocast(device_type, enabled=False):
            injection = content.to(blocks.dtype)
            if memory is not None and past is not None and self.config.num_taps > 0:
                injection = injection + self._carried(past[..., : x.shape[-1]], memory.mask, blocks, x.shape[1])
            tensors = {"blocks": blocks, "injection": injection}
            if key_mask is not None:
                tensors["present"] = key_mask[..., None]
                tensors["injection"] = torch.where(tensors["present"], injection, 0.0)
            return BoundMonotoneCell(
                evaluate=self.evaluate,
                tensors=tensors,
                batch_axes={name: 0 for name in tensors if name != "blocks"},
                dtype=blocks.dtype,
                autocast=Autocast.current(device_type),  # off
                key_mask=key_mask,
                weights=weights,
                activation=self.config.activation,
                margin=self.config.margin,
                lipschitz=weights["lipschitz"],
            )

    def project(self, z: Tensor, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """States, keys and values, (B, M, 3 D)."""
        return torch.cat([z, self.key_value(x)], dim=-1)

    def evaluate(self, z: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """f(z), (B, L, D), reading nothing but `tensors`."""
        operator = CausalOperator(tensors["blocks"], tensors.get("present"))
        return self.config.activation(operator(z) + tensors["injection"], 1.0)

    def _content(self, x: Tensor, past: Tensor | None, mask: Tensor) -> Tensor:
        """u without what the states of memory add, (B, L, D), where `past` is what `project` gave and K = M + L."""
        width = x.shape[-1]
        query = self._heads(self.query(x))  # (B, H, L, E)
        key_value = self.key_value(x)
        if past is not None:
            key_value = torch.cat([past[..., width:].to(key_value.dtype), key_value], dim=1)
        key, value = map(self._heads, key_value.chunk(2, dim=-1))  # (B, H, K, E)
        distances = self._heads(self.distance(sinusoids(key_value.shape[1], width, like=x)))  # (H, K, E)
        scale = query.shape[-1] ** -0.5
        by_distance = F.pad(query @ (scale * distances).transpose(-2, -1), (0, 1))
        bias = by_key(by_distance) + (mask if mask.dim() == 2 else mask[:, None])
        vector = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype), scale=scale)
        attention = self.merge(vector.transpose(1, 2).flatten(2))
        return self.inject(self.norm(x + attention))

    def _carried(self, z: Tensor, mask: Tensor | None, blocks: Tensor, length: int) -> Tensor:
        """sum_k W_k z_{t-k} over past states, (B, M, D), where they are no padding: (B, L, D), of the first K positions."""
        num_taps = self.config.num_taps
        past = z if mask is None else torch.where(mask[..., None], z, 0.0)
        past = past[:, -num_taps:].to(blocks.dtype)
        before = F.pad(past, (0, 0, num_taps - past.shape[1], 0))
        reached = min(num_taps, length)
        carried = CausalOperator(blocks)(before.new_zeros(before.shape[0], reached, before.shape[2]), before)
        return F.pad(carried, (0, 0, 0, length - reached))

    def _heads(self, x: Tensor) -> Tensor:
        """(..., L, D) to (..., H, L, E)."""
        return x.unflatten(-1, (self.config.num_heads, -1)).transpose(-3, -2)


def _shrink(size: Tensor, limit: Tensor | float) -> Tensor:
    """The factor, at most 1, that brings `size` to `limit` at most."""
    return limit / size.clamp(min=limit)
