"""What a segment leaves to the next one: past states and inputs, or in generation what a cell computes of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Projection = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""A cell's `project`: states and inputs, (B, M, D) each, and weights to (B, M, P)."""


T = TypeVar("T")


def as_part(named: Mapping[str, T], part: int | str) -> dict[str, T]:
    """What a part of a cell names, under names that tell it from other parts'."""
    return {f"{part}.{name}": value for name, value in named.items()}


def part_of(named: Mapping[str, T], part: int | str) -> dict[str, T]:
    """The inverse: of all that is named, what one part does."""
    prefix = f"{part}."
    return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}


class Past(ABC):
    """Past positions that a segment may attend to; never carries a gradient.

    Attributes:
        mask: (B, M) bool, False at padding, which is not attended to; None if there is none.
        num_tokens: positions of the text up to here, those that are no longer kept included and padding not, (B,) int64;
            None if the text begins with these positions. See `count`.
    """

    mask: Tensor | None
    num_tokens: Tensor | None

    @property
    @abstractmethod
    def length(self) -> int:
        """Positions, M."""

    @property
    @abstractmethod
    def num_sequences(self) -> int:
        """B."""

    @abstractmethod
    def project(self, project: Projection, weights: Mapping[str, Tensor]) -> Tensor:
        """What a cell reads of these positions, (B, M, P), where `project` computes it."""

    @abstractmethod
    def parts(self, num_blocks: int) -> Sequence[Self]:
        """The past of each block or layer, of one that has all of theirs side by side."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where it is."""

    def count(self) -> Tensor:
        """`num_tokens`, counted where it is None."""
        if self.num_tokens is not None:
            return self.num_tokens
        if self.mask is not None:
            return self.mask.sum(dim=1)
        return torch.full((self.num_sequences,), self.length, device=self.device)

    def mark_padding(self, key_mask: Tensor) -> Self:
        """The same past, of whose newest positions those are padding where `key_mask`, (B, L) bool, is False."""
        earlier = self.length - key_mask.shape[1]  # below 0, the oldest positions of the segment are not in it
        mask = F.pad(key_mask, (earlier, 0), value=True)
        num_tokens = self.num_tokens if self.num_tokens is None else self.num_tokens - (~key_mask).sum(dim=1)
        return replace(self, mask=mask if self.mask is None else mask & self.mask, num_tokens=num_tokens)  # pyright: ignore[reportArgumentType]

    def _longer_mask(self, num_new: int, max_length: int) -> Tensor | None:
        """The mask with `num_new` more positions, none of them padding, cut to the newest `max_length`."""
        return None if self.mask is None else F.pad(self.mask, (0, num_new), value=True)[:, -max_length:].contiguous()


@dataclass(frozen=True)
class Memory(Past):
    """Past equilibria and the inputs they belong to: independent of the weights, so that these may learn meanwhile.

    Attributes:
        z: equilibria of the last M positions, (B, M, D). Of several blocks, what each was given, side by side.
        x: the injected inputs of the same positions, (B, M, D). Keys and values of memory are computed from both by
            the current weights, so that memory gives the same keys as the positions would have in one long segment.
        mask, num_tokens: see `Past`.
    """

    z: Tensor
    x: Tensor
    mask: Tensor | None = None
    num_tokens: Tensor | None = None

    @property
    def length(self) -> int:
        return self.z.shape[1]

    @property
    def num_sequences(self) -> int:
        return self.z.shape[0]

    @property
    def device(self) -> torch.device:
        return self.z.device

    def project(self, project: Projection, weights: Mapping[str, Tensor]) -> Tensor:
        return project(self.z, self.x, weights)

    @staticmethod
    def extend(memory: Memory | None, z: Tensor, x: Tensor, max_length: int) -> Memory | None:
        """`memory` followed by (z, x), (B, L, D) each, detached and cut to the last `max_length` positions."""
        if max_length == 0:
            return None
        z, x, mask = z.detach(), x.detach(), None
        num_tokens = torch.full((z.shape[0],), z.shape[1], device=z.device)
        if memory is not None:
            mask = memory._longer_mask(z.shape[1], max_length)
            num_tokens += memory.count()
            z, x = torch.cat([memory.z, z], dim=1), torch.cat([memory.x, x], dim=1)
        return Memory(z[:, -max_length:].contiguous(), x[:, -max_length:].contiguous(), mask, num_tokens)

    def parts(self, num_blocks: int) -> list[Memory]:
        return [replace(self, z=z) for z in self.z.chunk(num_blocks, dim=-1)]

    @staticmethod
    def joined(parts: Sequence[Memory]) -> Memory:
        """The inverse of `parts`: one memory, of memories of the same positions."""
        return replace(parts[0], z=torch.cat([memory.z for memory in parts], dim=-1))

    def share(self, rank: int, num_ranks: int) -> Memory:
        """Of all streams, those of one process: `num_ranks` equal shares in order."""
        size = len(self.z) // num_ranks
        own = slice(rank * size, (rank + 1) * size)
        mask, num_tokens = (None if tensor is None else tensor[own] for tensor in (self.mask, self.num_tokens))
        return Memory(self.z[own], self.x[own], mask, num_tokens)


@dataclass(frozen=True)
class ProjectedMemory(Past):
    """Past positions as generation keeps them: what a cell reads of them, by weights that no longer change.

    Attributes:
        features: (B, M, P), such as keys and values. Of several blocks, side by side.
        mask, num_tokens: see `Past`.
        weights: what binding has computed of the parameters alone, so that it need not for every token.
    """

    features: Tensor
    mask: Tensor | None = None
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    num_tokens: Tensor | None = None

    @property
    def length(self) -> int:
        return self.features.shape[1]

    @property
    def num_sequences(self) -> int:
        return self.features.shape[0]

    @property
    def device(self) -> torch.device:
        return self.features.device

    def project(self, project: Projection, weights: Mapping[str, Tensor]) -> Tensor:
        return self.features

    def extended(self, features: Tensor, max_length: int) -> ProjectedMemory:
        """Followed by `features`, (B, L, P), detached and cut to the last `max_length` positions."""
        mask = self._longer_mask(features.shape[1], max_length)
        longer = torch.cat([self.features, features.detach()], dim=1)
        num_tokens = self.count() + features.shape[1]
        return replace(self, features=longer[:, -max_length:], mask=mask, num_tokens=num_tokens)

    def select(self, sequences: Tensor) -> ProjectedMemory:
        """The past of some sequences, by their indices, (B',) int64."""
        mask, num_tokens = (None if tensor is None else tensor[sequences] for tensor in (self.mask, self.num_tokens))
        return replace(self, features=self.features[sequences], mask=mask, num_tokens=num_tokens)

    def without_newest(self, num_positions: int) -> ProjectedMemory:
        """All but the newest so many positions."""
        length = self.length - num_positions
        mask, num_tokens = self.mask, self.num_tokens
        if num_tokens is not None:
            num_tokens = num_tokens - (num_positions if mask is None else mask[:, length:].sum(dim=1))
        mask = None if mask is None else mask[:, :length]
        return replace(self, features=self.features[:, :length], mask=mask, num_tokens=num_tokens)

    def parts(self, num_blocks: int) -> list[ProjectedMemory]:
        chunks = self.features.chunk(num_blocks, dim=-1)
        return [replace(self, features=chunk, weights=part_of(self.weights, i)) for i, chunk in enumerate(chunks)]

    @staticmethod
    def joined(parts: Sequence[ProjectedMemory]) -> ProjectedMemory:
        """The inverse of `parts`."""
        weights = {name: tensor for i, part in enumerate(parts) for name, tensor in as_part(part.weights, i).items()}
        features = torch.cat([part.features for part in parts], dim=-1)
        return replace(parts[0], features=features, weights=weights)


def known_weights(past: Past | None) -> Mapping[str, Tensor]:
    """What binding need not compute of the parameters again; nothing, where their gradient is asked for."""
    if isinstance(past, ProjectedMemory) and not torch.is_grad_enabled():
        return past.weights
    return {}
