"""The multiscale cell: tokens, chunks of tokens and chunks of chunks, all at one equilibrium."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from deq_lm.autocast import Autocast
from deq_lm.cells.base import BoundCell, Cell, check_inputs
from deq_lm.cells.chunks import Timeline, chunk_ends, coarsen, slots, take, tokens
from deq_lm.cells.memory import Memory, Past, ProjectedMemory, as_part, known_weights, part_of
from deq_lm.cells.transformer_xl import TransformerXLCell, TransformerXLConfig, draw_linear


@dataclass(frozen=True, kw_only=True)
class CoarseRate:
    """A rate coarser than that of the tokens.

    Attributes:
        ratio: elements of the next finer rate that make one of this.
        d_model: width of an element; num_heads divides it.
        num_heads: attention heads among the elements of this rate.
        d_inner: hidden width of their feed-forward network.

    Raises:
        ValueError: if a value is out of range.
    """

    ratio: int = 4
    d_model: int = 64
    num_heads: int = 4
    d_inner: int = 128

    def __post_init__(self) -> None:
        if self.ratio < 2:
            raise ValueError(f"ratio={self.ratio}: expected 2 or more elements a chunk.")
        # the rest is checked as that of a Transformer-XL cell
        TransformerXLConfig(d_model=self.d_model, num_heads=self.num_heads, d_inner=self.d_inner)


@dataclass(frozen=True, kw_only=True)
class MultiscaleConfig(TransformerXLConfig):
    """Sizes and variants: those of the Transformer-XL cell are of the tokens' rate, and the variants of all rates.

    Attributes:
        coarse: the other rates, from fine to coarse; chunks have as many tokens as the product of the ratios so far.
        injection: where x, and what a rate is told by others, enters: into the first residual sum.
        attention_window: of the tokens. Chunks see all of memory and segment, which is then what they are for.

    Raises:
        ValueError: if a value is out of range; if memory is shorter than a chunk, which a token's memory has to hold.
    """

    coarse: tuple[CoarseRate, ...] = (CoarseRate(),)
    injection: Literal["residual"] = "residual"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.injection != "residual":
            raise ValueError(f"injection={self.injection!r}: expected 'residual', the only way of a multiscale cell.")
        if not self.coarse:
            raise ValueError("coarse=(): expected one rate or more beside the tokens; name=transformer_xl has none.")
        if 0 < self.mem_len < self.chunk_lengths[-1]:
            raise ValueError(
                f"mem_len={self.mem_len} with chunks of {self.chunk_lengths[-1]} tokens: expected memory of a chunk or "
                "more, or none (0), so that a chunk that is cut by a segment's start has all of its tokens."
            )

    @property
    def chunk_lengths(self) -> tuple[int, ...]:
        """Tokens of a chunk, by rate, that of the tokens (1) left out."""
        return tuple(accumulate((rate.ratio for rate in self.coarse), lambda a, b: a * b))

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of an element, by rate."""
        return (self.d_model, *(rate.d_model for rate in self.coarse))

    def blocks(self) -> list[TransformerXLConfig]:
        """One for each rate."""
        shared = {field.name: getattr(self, field.name) for field in fields(TransformerXLConfig)}
        of_tokens = TransformerXLConfig(**{**shared, "num_blocks": 1})
        return [of_tokens] + [
            replace(
                of_tokens,
                d_model=rate.d_model,
                num_heads=rate.num_heads,
                d_inner=rate.d_inner,
                mem_len=self.mem_len // length,
                attention_window=None,
            )
            for rate, length in zip(self.coarse, self.chunk_lengths, strict=True)
        ]


class MultiscaleCell(Cell):
    """One Transformer-XL block a rate, each told the state of the next finer and the next coarser rate:

        f_r(z)_i = block_r(z_r, x_i [r = 0] + D_r (z_{r-1} of chunk i) + U_r^(place of i) z_{r+1, newest before i})_i.

    Rate 0 are the tokens; an element of rate r stands for a chunk of k_r elements of rate r - 1. D_r is a strided
    convolution, one matrix for each of them. The newest chunk that was complete before element i is held until the next
    one is; U_r^(p) reads it by a matrix for each place p in the chunk that i is in, so as to say something else to each of
    the k_r elements. All is added, as in the paper's fusion. Within a rate, elements see earlier ones by relative
    attention.

    *Causality.* A chunk's element stands at the position of its last token. It reads its own tokens and earlier elements,
    and is read by later positions only. So f at a position depends on positions up to it; and as tokens read no element of
    their own position, df/dz has the blocks' own Jacobians on its diagonal: its eigenvalues are those of the rates alone,
    whatever D and U are.

    *The state* is (B, L, D_0 + D_1 + ...): at each position its token's vector and, beside it, those of the chunks that end
    there; where none does, f is 0 and so is the solution. Nothing is computed for these zeros but the solver's own sums,
    and the block of a rate runs on its elements alone. The other way is a sequence of L (1 + 1 / k + ...) vectors, each
    element after its last token. It saves the zeros, but chunks end at other positions in every sequence of a padded
    batch, so that this sequence's length, and what stands where, would differ between sequences and between tokens of a
    generated text, and solvers, adjoints, masks, counts by position and cache would have to know. As it is, to all of them
    a position is a position.

    *Chunks* are counted from the start of a stream's text, padding left out (`Past.count`), not of a segment: a text has
    the same chunks however it is cut.

    References:
        Bai, Koltun, Kolter 2020, "Multiscale deep equilibrium models", section 3. Dai et al. 2019, "Transformer-XL".
    """

    def __init__(self, config: MultiscaleConfig) -> None:
        super().__init__(config)
        self.config = config
        self.blocks = nn.ModuleList(TransformerXLCell(block) for block in config.blocks())
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for finer, rate in zip(config.widths, config.coarse, strict=False):
            self.down.append(nn.Linear(rate.ratio * finer, rate.d_model, bias=False))  # D
            self.up.append(nn.Linear(rate.d_model, rate.ratio * finer, bias=False))  # U, place after place
        if config.weight_norm:
            for linear in (*self.down, *self.up):
                parametrizations.weight_norm(linear)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for block in self._blocks():
            block.reset_parameters()
        for linear in (*self.down, *self.up):
            assert isinstance(linear, nn.Linear)
            draw_linear(linear, self.config.init_std)

    def as_state(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, sum(self.config.widths[1:])))

    def read_out(self, z: Tensor) -> Tensor:
        return z[..., : self.config.d_model].contiguous()

    def bind(
        self, x: Tensor, memory: Past | None = None, key_mask: Tensor | None = None, *, sliding: bool = False
    ) -> BoundCell:
        width = sum(self.config.widths)
        check_inputs(self.config.d_model, 3 * width, x, memory, key_mask, state_width=width)
        autocast = Autocast.current(x.device.type)
        mixing = part_of(known_weights(memory), "mixing")
        if not mixing:
            mixing = {
                f"{name}.{i}": autocast.convert(linear.weight)
                for name, linears in (("down", self.down), ("up", self.up))
                for i, linear in enumerate(linears)
                if isinstance(linear, nn.Linear)
            }
        past_length = 0 if memory is None else memory.length
        timelines, told, indices = [tokens(x, memory, key_mask)], [x], dict[str, Tensor]()
        for i, rate in enumerate(self.config.coarse):
            timeline, chunks = coarsen(timelines[i], rate.ratio)
            ends = chunk_ends(timeline, past_length)
            indices |= {f"members.{i}": chunks.members, f"held.{i}": chunks.held}
            indices |= {f"ends.{i}": ends, f"slots.{i}": slots(ends, x.shape[1])}
            timelines.append(timeline)
            told.append(x.new_zeros(*ends.shape, rate.d_model))
            if memory is not None:
                finer, own = (self._past_elements(memory, j, timelines[j]) for j in (i, i + 1))
                told[i] = told[i] + mixed_up(own[:, -1:], chunks.past_held, mixing[f"up.{i}"], self.config.widths[i])
                told[i + 1] = told[i + 1] + mixed_down(finer, chunks.past_members, mixing[f"down.{i}"])
        bound = [
            block.bind(
                told[r],
                None if memory is None else self._past(memory, r, timelines[r]),
                key_mask if r == 0 else None,
                sliding=sliding,
            )
            for r, block in enumerate(self._blocks())
        ]
        tensors, batch_axes, weights = {**mixing, **indices}, dict.fromkeys(indices, 0), as_part(mixing, "mixing")
        for r, f in enumerate(bound):
            tensors |= as_part(f.tensors, r)
            batch_axes |= as_part(f.batch_axes, r)
            weights |= as_part(f.weights, r)
        return BoundCell(self.evaluate, tensors, batch_axes, x.dtype, autocast, key_mask, weights)

    def evaluate(self, z: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """f(z), (B, L, D_0 + D_1 + ...), reading nothing but `tensors`."""
        states = z.split(list(self.config.widths), dim=-1)
        elements = [states[0], *(take(state, tensors[f"ends.{i}"]) for i, state in enumerate(states[1:]))]
        images = []
        for r, block in enumerate(self._blocks()):
            told = tensors[f"{r}.input"]
            if r > 0:
                told = told + mixed_down(elements[r - 1], tensors[f"members.{r - 1}"], tensors[f"down.{r - 1}"])
            if r + 1 < len(elements):
                told = told + mixed_up(elements[r + 1], tensors[f"held.{r}"], tensors[f"up.{r}"], self.config.widths[r])
            # where no chunk of a rate ends, as at most tokens of a generated text, there is nothing to compute
            own = {**part_of(tensors, r), "input": told}
            image = block.evaluate(elements[r], own) if told.shape[1] > 0 else told
            images.append(image if r == 0 else take(image, tensors[f"slots.{r - 1}"]))
        return torch.cat(images, dim=-1)

    def project(self, z: Tensor, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """State, keys and values of every rate, (B, M, 3 (D_0 + D_1 + ...)); those of a chunk count where one ends."""
        states = z.split(self.config.widths, dim=-1)
        keys_values = [
            block.project(state, state, part_of(weights, r))  # injected into the residual, x makes no key
            for r, (block, state) in enumerate(zip(self._blocks(), states, strict=True))
        ]
        return torch.cat([z, *keys_values], dim=-1)

    def _past(self, memory: Past, rate: int, timeline: Timeline) -> Past | None:
        """Of memory, the elements of one rate; of tokens no more than the attention window has."""
        elements, window = timeline.num_past, self.config.attention_window
        newest = min(elements, window - 1) if rate == 0 and window is not None else elements
        if newest == 0:
            return None
        own = slice(elements - newest, elements)
        mask = None if rate == 0 and memory.mask is None else timeline.present[:, own]
        position = timeline.position[:, own]
        if isinstance(memory, Memory):
            z = take(self._channels(memory.z, rate), position)
            return Memory(z, z, mask)  # injected into the residual, x makes no key
        assert isinstance(memory, ProjectedMemory)
        keys_values = self._channels(memory.features, rate, keys_values=True)
        return ProjectedMemory(take(keys_values, position), mask, part_of(memory.weights, rate))

    def _past_elements(self, memory: Past, rate: int, timeline: Timeline) -> Tensor:
        """The states of one rate's elements in memory, (B, M_r, D_r)."""
        states = memory.z if isinstance(memory, Memory) else memory.project(self.project, {})  # states come first
        return take(self._channels(states, rate), timeline.position[:, : timeline.num_past])

    def _channels(self, features: Tensor, rate: int, *, keys_values: bool = False) -> Tensor:
        """Of a state, or of what `project` gives, the part of one rate."""
        widths = self.config.widths
        start, size = sum(widths[:rate]), widths[rate]
        if keys_values:
            start, size = sum(widths) + 2 * start, 2 * size
        return features[..., start : start + size]

    def _blocks(self) -> list[TransformerXLCell]:
        return [block for block in self.blocks if isinstance(block, TransformerXLCell)]


def mixed_down(finer: Tensor, members: Tensor, weight: Tensor) -> Tensor:
    """What the elements of chunks, (B, N, k) of (B, N_finer, W_finer), add up to by a matrix each: (B, N, W)."""
    return F.linear(take(finer, members).flatten(2), weight)


def mixed_up(coarser: Tensor, held: Tensor, weight: Tensor, width: int) -> Tensor:
    """What chunks, (B, N, W), say to the elements by which they are `held`, (B, N_finer): (B, N_finer, width)."""
    by_place = F.linear(coarser, weight).unflatten(-1, (-1, width))  # (B, N, k, width)
    return take(by_place.flatten(1, 2), held)
