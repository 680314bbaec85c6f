"""The cell contract: `bind` everything that does not depend on z once, then evaluate f(z) as often as a solver likes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config

from deq_lm.autocast import Autocast, KnownPrecision
from deq_lm.cells.memory import Memory, Past, ProjectedMemory

UNLIMITED = 2**31 - 1
"""A number of positions that no text has."""


@dataclass(frozen=True, kw_only=True)
class CellConfig:
    """What every cell's configuration says; a cell subclasses it and adds its own fields (plain data, with defaults).

    The model reads these and the two properties, and no other:

    Attributes:
        d_model: width of the state and of the injected input.
        mem_len: positions of memory a segment may attend to; 0 keeps none.
        init_std: standard deviation of the initial effective weights, the token embedding's included.
        num_blocks: f is this many such maps one after the other, each with weights and memory of its own
            (`ComposedCell`).

    Raises:
        ValueError: if a value is out of range.
    """

    d_model: int = 128
    mem_len: int = 64
    init_std: float = 0.05
    num_blocks: int = 1

    def __post_init__(self) -> None:
        if self.d_model < 1:
            raise ValueError(f"d_model={self.d_model}: expected 1 or more.")
        if self.mem_len < 0:
            raise ValueError(f"mem_len={self.mem_len}: expected 0 (no memory) or more positions.")
        if not self.init_std > 0.0:
            raise ValueError(f"init_std={self.init_std}: expected a value above 0.")
        if self.num_blocks < 1:
            raise ValueError(f"num_blocks={self.num_blocks}: expected 1 or more.")

    @property
    def reads_input(self) -> bool:
        """Whether f depends on x; an equilibrium of a map that does not would know nothing of the text."""
        return True

    @property
    def has_proximal_form(self) -> bool:
        """Whether a bound cell offers its parts as `proximal_form`, which operator splittings need."""
        return False


@dataclass(frozen=True)
class BoundCell(KnownPrecision):
    """f with all but z fixed: weights, injection, memory, padding, one dropout mask, the autocast state.

    Calling it is one evaluation. `tensors` are all that f reads besides z; those that require a gradient are `inputs`,
    which an implicit adjoint needs by name because an `autograd.Function` cannot see into a closure.

    At padding f is 0: z = 0 is the solution there, found before the first step, so that padding adds nothing to an inner
    product over positions and never keeps a solve going.

    Attributes:
        evaluate: (z, tensors) -> f(z), both (B, L, ...), of the shape that `Cell.as_state` gives; pure.
        tensors: what f reads, by name.
        batch_axes: of those that differ between sequences, which axis is B; all others are shared by the sequences.
        dtype: what f computes in. A solver's state is wider where this is half precision, and is converted at the door.
        autocast: the mixed-precision state at `bind`; every evaluation runs under it, the backward pass included.
        key_mask: (B, L) bool, False at padding; None if there is none.
        weights: what `bind` has computed of the parameters alone; generation hands it to the next `bind`.
    """

    evaluate: Callable[[Tensor, Mapping[str, Tensor]], Tensor]
    tensors: Mapping[str, Tensor]
    batch_axes: Mapping[str, int]
    dtype: torch.dtype
    autocast: Autocast
    key_mask: Tensor | None = None
    weights: Mapping[str, Tensor] = field(default_factory=dict)

    def __call__(self, z: Tensor) -> Tensor:
        with self.autocast.enter():
            image = self.evaluate(z.to(self.dtype), self.tensors).to(z.dtype)
        return image if self.key_mask is None else image.masked_fill(~self.key_mask[..., None], 0.0)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The tensors a gradient can flow to, in a fixed order."""
        return tuple(self.tensors[name] for name in self._differentiable())

    def with_inputs(self, inputs: Sequence[Tensor]) -> BoundCell:
        """The same f reading `inputs` (ordered as `self.inputs`) instead of its own."""
        return replace(self, tensors={**self.tensors, **dict(zip(self._differentiable(), inputs, strict=True))})

    def select(self, sequences: slice) -> BoundCell:
        """The same f of some of the sequences, each computed as before."""
        chosen = {
            name: self.tensors[name][(slice(None),) * axis + (sequences,)] for name, axis in self.batch_axes.items()
        }
        key_mask = None if self.key_mask is None else self.key_mask[sequences]
        return replace(self, tensors={**self.tensors, **chosen}, key_mask=key_mask)

    def _differentiable(self) -> list[str]:
        return [name for name, tensor in self.tensors.items() if tensor.requires_grad]


class Cell(nn.Module):
    """The map f of a deep equilibrium model; knows neither solver nor loss.

    A cell is made of nothing but its configuration, `YourCell(config)`, and draws its parameters in `reset_parameters`.
    It is one block, whatever `config.num_blocks` says.

    Attributes:
        evaluate: (z, tensors) -> f(z), where it is a method that `bind` hands to its `BoundCell`.
    """

    evaluate: Any

    def __init__(self, config: CellConfig) -> None:
        super().__init__()
        self.mem_len = config.mem_len

    @abstractmethod
    def bind(
        self, x: Tensor, memory: Past | None = None, key_mask: Tensor | None = None, *, sliding: bool = False
    ) -> BoundCell:
        """Fix everything but z for one solve.

        Args:
            x: the injected input (embedded tokens), (B, L, D).
            memory: of earlier positions, or None at the start of a stream. What f reads of them is
                `memory.project(self.project, weights)`; where `memory.mask` is False a position is padding and
                must not be attended to.
            key_mask: (B, L) bool, False where a position is padding and must not be attended to; to be handed on to the
                `BoundCell`.
            sliding: every position sees itself and the `num_visible` positions before it, be they in memory or in x, so
                that it does not matter how a text is cut into segments: what generation needs. Otherwise a segment sees
                all of its memory, and of itself all up to each position.
        """

    def as_state(self, x: Tensor) -> Tensor:
        """`x` in the shape in which a solver is to see the state, (B, L, ...)."""
        return x

    def read_out(self, z: Tensor) -> Tensor:
        """What a state says to the outside, of the shape of x."""
        return z

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw all parameters anew (after construction on the meta device, say); `__init__` calls it too."""

    def compile(self, *arguments: Any, **options: Any) -> None:
        """Compile f, by `torch.compile`; a cell of several blocks has none of its own."""
        if hasattr(self, "evaluate"):
            # an adjoint solve runs one recorded evaluation backwards many times
            functorch_config.donated_buffer = False
            self.evaluate = torch.compile(self.evaluate, *arguments, **options)

    @property
    def num_visible(self) -> int:
        """Past positions that a sliding position sees: `mem_len`, or all in a model without memory."""
        return self.mem_len or UNLIMITED

    def project(self, z: Tensor, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """What later positions read of past ones, (B, M, P).

        Args:
            z: their equilibria, (B, M, ...).
            x: their inputs, (B, M, D).
            weights: `BoundCell.weights`, of the present parameters.
        """
        return torch.cat([z, x], dim=-1)

    def remember(self, f: BoundCell, z: Tensor, x: Tensor, memory: Memory | None) -> Memory | None:
        """The memory for the next segment, detached, cut to the cell's memory length (None if that is 0).

        Args:
            f: what `bind` gave for this segment.
            z: the equilibrium, (B, L, ...), as a state.
            x: the injected input it belongs to, (B, L, D).
            memory: the memory this segment was given.
        """
        return Memory.extend(memory, z, x, self.mem_len)

    def keep(self, f: BoundCell, z: Tensor, x: Tensor, past: Past | None) -> ProjectedMemory:
        """As `remember`, after a `sliding` bind: what the next tokens read of the last `num_visible` positions."""
        with torch.no_grad(), f.autocast.enter():
            features = self.project(z, x, f.weights)
            if past is None:
                past = ProjectedMemory(features[:, :0])
            elif isinstance(past, Memory):
                past = ProjectedMemory(past.project(self.project, f.weights), past.mask, num_tokens=past.num_tokens)
        assert isinstance(past, ProjectedMemory)
        weights = {name: weight.detach() for name, weight in f.weights.items()}
        return replace(past, weights=weights).extended(features, self.num_visible)


def check_inputs(
    d_model: int,
    num_features: int,
    x: Tensor,
    memory: Past | None,
    key_mask: Tensor | None,
    *,
    state_width: int | None = None,
) -> None:
    """Raises ValueError unless the arguments of `Cell.bind` belong together and to a cell of this width and projection.

    `state_width` is that of the state, where it is not `d_model`.
    """
    batch, length, width = x.shape
    if width != d_model:
        raise ValueError(f"x of shape {tuple(x.shape)}: expected (B, L, d_model), and d_model is {d_model}.")
    if memory is not None:
        of_memory = {"z": width if state_width is None else state_width, "x": width}
        expected = of_memory if isinstance(memory, Memory) else {"features": num_features}
        for name, size in expected.items():
            shape = tuple(getattr(memory, name).shape)
            if shape != (batch, memory.length, size):
                raise ValueError(
                    f"memory.{name} of shape {shape} with x of shape {tuple(x.shape)}: expected "
                    f"{(batch, memory.length, size)}. Start with memory=None when the streams change."
                )
    for name, mask, positions in (
        ("key_mask", key_mask, length),
        ("memory.mask", memory and memory.mask, 0 if memory is None else memory.length),
    ):
        if mask is not None and (mask.shape != (batch, positions) or mask.dtype != torch.bool):
            raise ValueError(
                f"{name} of shape {tuple(mask.shape)}, {mask.dtype}: expected {(batch, positions)}, bool, one value a "
                "position, False at padding. A key_mask is for x alone; memory brings its own mask."
            )
