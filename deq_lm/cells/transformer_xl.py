"""The Transformer-XL cell: relative attention over memory and segment, then a position-wise feed-forward network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from deq_lm.autocast import Autocast
from deq_lm.cells.attention_mask import attention_mask
from deq_lm.cells.base import UNLIMITED, BoundCell, Cell, CellConfig, check_inputs
from deq_lm.cells.memory import Past, known_weights
from deq_lm.cells.relative_position import by_key, sinusoids
from deq_lm.cells.variational_dropout import variational_mask


@dataclass(frozen=True, kw_only=True)
class TransformerXLConfig(CellConfig):
    """Sizes and variants of the cell, beside those of every cell.

    Attributes:
        num_heads: attention heads; d_model is divisible by it.
        d_inner: hidden width of the feed-forward network.
        norm: "post": h = LN(z + attention(z)), f = LN(h + ffn(h)).
            "pre": h = LN(z + attention(LN z)), f = h + ffn(h). The residual of the second half starts from the normalized
            value: with a plain residual stream, z + ..., the identity is part of f and its spectral radius is 1 or more.
        norm_attention: layer normalization of the attention vector, all heads together, before it is merged.
        gate: how the result b of attention, and that of the feed-forward network, is joined to the value c that passes it
            by: None adds them, c + b; "highway" gives 2 (g c + (1 - g) b), with a gate g = sigmoid(W h + a) for each
            feature, h being what attention or network has read. W and a begin at 0, where that is c + b; they are
            2 D (D + 1) more parameters a block. The input of injection "residual" is added afterwards, not gated.
        weight_norm: weight normalization of every linear map but those of gates, which begin at 0; computed once per solve.
        dropout: probability of the variational masks on the outputs of attention and feed-forward network, in [0, 1).
        injection: where x enters: "attention", as W_x x in queries, keys and values, which is the papers' way; "residual",
            as x itself in the first residual sum; "both"; "none" is a layer of an ordinary transformer, whose equilibrium
            would not depend on x.
        attention_window: newest positions a query may attend to, itself included; None is all.
        ffn_chunks: parts, at most, that the rows of the feed-forward network are computed in, one after the other, so that
            in a solve its hidden tensor is never there at once.
        recompute: what a recorded evaluation does not save but computes anew in each of its backward passes:
            "feed_forward" the hidden tensors (with `ffn_chunks`, one at a time), "block" everything (gradient
            checkpointing). An implicit adjoint makes a backward pass per step.

    Raises:
        ValueError: if a value is out of range.
    """

    num_heads: int = 4
    d_inner: int = 512
    norm: Literal["post", "pre"] = "post"
    norm_attention: bool = False
    gate: Literal["highway"] | None = None
    weight_norm: bool = False
    dropout: float = 0.0
    injection: Literal["attention", "residual", "both", "none"] = "attention"
    attention_window: int | None = None
    ffn_chunks: int = 1
    recompute: Literal["none", "feed_forward", "block"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_heads", "d_inner", "ffn_chunks", "attention_window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected 1 or more.")
        if self.d_model % self.num_heads:
            raise ValueError(
                f"d_model={self.d_model} is not divisible by num_heads={self.num_heads}: every head gets an equal share."
            )
        if self.norm not in ("post", "pre"):
            raise ValueError(f"norm={self.norm!r}: expected 'post' or 'pre'.")
        if self.gate not in (None, "highway"):
            raise ValueError(f"gate={self.gate!r}: expected 'highway', or None for plain residual sums.")
        if self.injection not in ("attention", "residual", "both", "none"):
            raise ValueError(f"injection={self.injection!r}: expected 'attention', 'residual', 'both' or 'none'.")
        if self.recompute not in ("none", "feed_forward", "block"):
            raise ValueError(f"recompute={self.recompute!r}: expected 'none', 'feed_forward' or 'block'.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout}: expected a probability in [0, 1).")

    @property
    def reads_input(self) -> bool:
        return self.injection != "none"

    @property
    def injects_into_attention(self) -> bool:
        return self.injection in ("attention", "both")

    @property
    def injects_into_residual(self) -> bool:
        return self.injection in ("residual", "both")


class TransformerXLCell(Cell):
    """f(z) for injected input x: queries, keys and values are W z + W_x x, and the score of key j for query i is

        ((q_i + u) . k_j + (q_i + v) . r_{i-j}) / sqrt(E),  j <= i,

    with u, v learned biases and r the projected sinusoid of the distance. Memory gives keys and values (no queries) from
    its own states and inputs by the current weights.

    References:
        Dai et al. 2019, "Transformer-XL", section 3.3. Bai, Kolter, Koltun 2019, "Deep equilibrium models", section 4.
        The gate: Srivastava, Greff, Schmidhuber 2015, "Highway networks", equation 3, in the place that Parisotto et al.
        2020, "Stabilizing Transformers for reinforcement learning", section 3.2, give it, and twice as large.
    """

    def __init__(self, config: TransformerXLConfig) -> None:
        super().__init__(config)
        self.config = config
        width = config.d_model
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        if config.injects_into_attention:
            self.inject = nn.Linear(width, 3 * width, bias=False)
        self.distance = nn.Linear(width, width, bias=False)
        self.merge = nn.Linear(width, width, bias=False)
        self.expand = nn.Linear(width, config.d_inner)
        self.contract = nn.Linear(config.d_inner, width)
        self.content_bias = nn.Parameter(torch.empty(width))  # u, all heads side by side
        self.distance_bias = nn.Parameter(torch.empty(width))  # v
        self.attention_norm = nn.LayerNorm(width)
        if config.norm_attention:
            self.vector_norm = nn.LayerNorm(width)
        self.output_norm = nn.LayerNorm(width)
        self.gates = nn.ParameterDict()
        for name in () if config.gate is None else ("attention_gate", "output_gate"):
            self.gates[name] = nn.Parameter(torch.empty(width, width))
            self.gates[f"{name}_bias"] = nn.Parameter(torch.empty(width))
        if config.weight_norm:
            for linear in self._linears():
                parametrizations.weight_norm(linear)
        self.reset_parameters()

    def _linears(self) -> list[nn.Linear]:
        return [module for module in self.children() if isinstance(module, nn.Linear)]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        std = self.config.init_std
        for linear in self._linears():
            draw_linear(linear, std)
        for bias in (self.content_bias, self.distance_bias):
            nn.init.normal_(bias, std=std)
        for parameter in self.gates.values():
            nn.init.zeros_(parameter)
        for module in self.children():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()

    def bind(
        self, x: Tensor, memory: Past | None = None, key_mask: Tensor | None = None, *, sliding: bool = False
    ) -> BoundCell:
        check_inputs(self.config.d_model, 2 * self.config.d_model, x, memory, key_mask)
        num_keys = x.shape[1] + (0 if memory is None else memory.length)
        autocast = Autocast.current(x.device.type)
        window = min(self.num_visible + 1 if sliding else UNLIMITED, self.config.attention_window or UNLIMITED)
        weights = known_weights(memory)
        if not weights or num_keys >= weights["distances"].shape[-1]:
            # in generation for more keys than there are yet, so that it is not for every token
            weights = self._weights(max(num_keys, min(window, 2 * num_keys)) if sliding else num_keys, autocast, x)
        tensors = {name: tensor for name, tensor in weights.items() if name != "inject"}
        if sliding:
            tensors["distances"] = weights["distances"][..., -num_keys - 1 :]
        tensors["mask"] = autocast.convert(attention_mask(x, memory, key_mask, window))
        if "inject" in weights:
            tensors["injection"] = F.linear(x, weights["inject"])  # (B, L, 3 D)
        if self.config.injects_into_residual:
            tensors["input"] = x
        if memory is not None:
            keys_values = memory.project(self.project, weights).chunk(2, dim=-1)
            tensors["memory_key"], tensors["memory_value"] = map(self._heads, keys_values)
        if self.training and self.config.dropout > 0:
            tensors["attention_dropout"] = variational_mask(x, self.config.dropout)
            tensors["output_dropout"] = variational_mask(x, self.config.dropout)
        axes = {"mask": 0, "memory_key": 1, "memory_value": 1}
        axes |= dict.fromkeys(("injection", "input", "attention_dropout", "output_dropout"), 0)
        if tensors["mask"].dim() == 2:  # without padding, the same for all
            del axes["mask"]
        batch_axes = {name: axis for name, axis in axes.items() if name in tensors}
        return BoundCell(self.evaluate, tensors, batch_axes, x.dtype, autocast, key_mask, weights)

    def _weights(self, num_keys: int, autocast: Autocast, like: Tensor) -> dict[str, Tensor]:
        """All that binding computes of parameters alone, for up to so many keys."""
        width = self.config.d_model
        distances = F.linear(sinusoids(num_keys, width, like=like), self.distance.weight * self._scale)
        distances = F.pad(distances, (0, 0, 0, 1))  # (K + 1, D): the unused column of `by_key`
        # Reading a weight computes its normalization: here, once.
        weights = {
            "qkv": autocast.convert(self.qkv.weight),
            "distances": self._heads(distances).transpose(-2, -1).contiguous(),  # (H, E, K + 1)
            "content_bias": autocast.convert(self._heads(self.content_bias)[:, None, None]),  # (H, 1, 1, E)
            "distance_bias": autocast.convert(self._heads(self.distance_bias)[:, None, None]),  # (H, 1, 1, E)
            "merge": autocast.convert(self.merge.weight),
            "expand": autocast.convert(self.expand.weight),
            "expand_bias": autocast.convert(self.expand.bias),
            "contract": autocast.convert(self.contract.weight),
            "contract_bias": autocast.convert(self.contract.bias),
            "attention_norm": self.attention_norm.weight,
            "attention_norm_bias": self.attention_norm.bias,
            "output_norm": self.output_norm.weight,
            "output_norm_bias": self.output_norm.bias,
        }
        weights |= {name: autocast.convert(parameter) for name, parameter in self.gates.items()}
        if self.config.norm_attention:
            weights |= {"vector_norm": self.vector_norm.weight, "vector_norm_bias": self.vector_norm.bias}
        if self.config.injects_into_attention:
            weights["inject"] = autocast.convert(self.inject.weight)
        return weights

    def project(self, z: Tensor, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Keys and values, (B, M, 2 D)."""
        width = self.config.d_model
        if self.config.norm == "pre":
            z = self._normalize(z, weights, "attention_norm")
        keys_values = F.linear(z, weights["qkv"][width:])
        return keys_values + F.linear(x, weights["inject"][width:]) if "inject" in weights else keys_values

    def evaluate(self, z: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """f(z), (B, L, D), reading nothing but `tensors`."""
        return (
            _recomputed(self._evaluate, z, tensors) if self.config.recompute == "block" else self._evaluate(z, tensors)
        )

    def _evaluate(self, z: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        pre = self.config.norm == "pre"
        read = self._normalize(z, tensors, "attention_norm") if pre else z
        attention = _drop(self._attention(read, tensors), tensors, "attention_dropout")
        h = _joined(z, attention, read, tensors, "attention_gate")
        if "input" in tensors:
            h = h + tensors["input"]
        h = self._normalize(h, tensors, "output_norm" if pre else "attention_norm")
        image = _drop(self._feed_forward(h, tensors), tensors, "output_dropout")
        out = _joined(h, image, h, tensors, "output_gate")
        return out if pre else self._normalize(out, tensors, "output_norm")

    def _feed_forward(self, h: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        # as rows, a linear map's result is no view, and relu_ needs no copy for autograd
        rows = h.flatten(0, 1)
        chunks = rows.split(_chunk_rows(len(rows), self.config.ffn_chunks))
        if self.config.recompute == "feed_forward":
            images = [_recomputed(_two_layers, chunk, tensors) for chunk in chunks]
        else:
            images = [_two_layers(chunk, tensors) for chunk in chunks]
        return (images[0] if len(images) == 1 else torch.cat(images)).view_as(h)

    def _attention(self, z: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        projected = F.linear(z, tensors["qkv"])
        if "injection" in tensors:
            projected = projected + tensors["injection"]
        query, key, value = map(self._heads, projected.chunk(3, dim=-1))  # (H, B, L, E)
        if "memory_key" in tensors:
            key = torch.cat([tensors["memory_key"], key], dim=2)  # (H, B, K, E)
            value = torch.cat([tensors["memory_value"], value], dim=2)
        # Heads come before the batch, so that the distances are multiplied without a copy per sequence.
        distance_query = (query + tensors["distance_bias"]).flatten(1, 2)
        by_distance = torch.bmm(distance_query, tensors["distances"]).unflatten(1, query.shape[1:3])
        bias = by_key(by_distance) + tensors["mask"]  # (H, B, L, K)
        content_query = query + tensors["content_bias"]
        out = F.scaled_dot_product_attention(content_query, key, value, attn_mask=bias, scale=self._scale)
        vector = out.permute(1, 2, 0, 3).flatten(2)
        if self.config.norm_attention:
            vector = self._normalize(vector, tensors, "vector_norm")
        return F.linear(vector, tensors["merge"])

    @property
    def _scale(self) -> float:
        return (self.config.d_model // self.config.num_heads) ** -0.5

    def _heads(self, x: Tensor) -> Tensor:
        """(..., D) to (H, ..., E)."""
        return x.unflatten(-1, (self.config.num_heads, -1)).movedim(-2, 0)

    def _normalize(self, x: Tensor, tensors: Mapping[str, Tensor], name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], tensors[name], tensors[f"{name}_bias"])


@torch.no_grad()
def draw_linear(linear: nn.Linear, std: float) -> None:
    """Draw a linear map whose effective weight has this standard deviation, without bias."""
    if parametrize.is_parametrized(linear, "weight"):
        # Assigning to the effective weight sets magnitude and direction; an initializer writing to it would not.
        linear.weight = nn.init.normal_(torch.empty_like(linear.weight), std=std)
    else:
        nn.init.normal_(linear.weight, std=std)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def _chunk_rows(num_rows: int, num_chunks: int) -> int:
    """Rows of a chunk, a multiple of 16: matrix products round the rows left over from their blocks differently."""
    return num_rows if num_chunks == 1 else 16 * math.ceil(num_rows / num_chunks / 16)


def _two_layers(rows: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """W_2 relu(W_1 row + b_1) + b_2 of each row, (R, D)."""
    hidden = F.linear(rows, tensors["expand"], tensors["expand_bias"]).relu_()
    return F.linear(hidden, tensors["contract"], tensors["contract_bias"])


def _joined(carried: Tensor, branch: Tensor, read: Tensor, tensors: Mapping[str, Tensor], gate: str) -> Tensor:
    """The residual sum, gated if there is a gate of that name, which looks at what the branch has `read`."""
    if gate not in tensors:
        return carried + branch
    share = torch.sigmoid(F.linear(read, tensors[gate], tensors[f"{gate}_bias"]))
    return 2 * (share * carried + (1 - share) * branch)


def _recomputed(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """`function` with nothing saved for backward but its arguments; nothing random may be inside."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    result = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(result, Tensor)
    return result


def _drop(x: Tensor, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    return x * tensors[name] if name in tensors else x
