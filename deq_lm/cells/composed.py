"""A cell of several blocks, f = f_k(... f_1(z) ...): one equilibrium through a few layers of moderate width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deq_lm.cells.base import BoundCell, Cell, CellConfig
from deq_lm.cells.memory import Memory, Past, ProjectedMemory, as_part, part_of


class ComposedCell(Cell):
    """Cells applied in order, all given the same input x; each has weights, dropout masks and memory of its own.

    A block remembers what it was given, at the equilibrium: the first z*, the second f_1(z*), and so on. Two segments with
    memory are thus one long segment, as for a single block.
    """

    def __init__(self, config: CellConfig, blocks: Sequence[Cell]) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList(blocks)

    def reset_parameters(self) -> None:
        for block in self._cells():
            block.reset_parameters()

    def as_state(self, x: Tensor) -> Tensor:
        return self._cells()[0].as_state(x)

    def read_out(self, z: Tensor) -> Tensor:
        return self._cells()[0].read_out(z)

    def bind(
        self, x: Tensor, memory: Past | None = None, key_mask: Tensor | None = None, *, sliding: bool = False
    ) -> BoundCell:
        blocks = self._cells()
        bound = [
            block.bind(x, part, key_mask, sliding=sliding)
            for block, part in zip(blocks, self._parts(memory), strict=True)
        ]
        tensors, batch_axes = dict[str, Tensor](), dict[str, int]()
        for i, f in enumerate(bound):
            tensors |= as_part(f.tensors, i)
            batch_axes |= as_part(f.batch_axes, i)
        return BoundCell(_Chain(bound), tensors, batch_axes, bound[0].dtype, bound[0].autocast, key_mask)

    def remember(self, f: BoundCell, z: Tensor, x: Tensor, memory: Memory | None) -> Memory | None:
        if self.mem_len == 0:
            return None
        inputs = [state for _, state in self._inputs(f, z)]
        return Memory.extend(memory, torch.cat(inputs, dim=-1), x, self.mem_len)

    def keep(self, f: BoundCell, z: Tensor, x: Tensor, past: Past | None) -> ProjectedMemory:
        parts = zip(self._cells(), self._inputs(f, z), self._parts(past), strict=True)
        return ProjectedMemory.joined([block.keep(bound, state, x, part) for block, (bound, state), part in parts])

    def _inputs(self, f: BoundCell, z: Tensor) -> list[tuple[BoundCell, Tensor]]:
        """Each block as it is bound, and what it is given at the equilibrium."""
        chain = f.evaluate
        assert isinstance(chain, _Chain)
        with torch.no_grad(), f.autocast.enter():
            images = chain.images(z, f.tensors, last=len(self.blocks) - 1)
        return list(zip(chain.blocks, [z, *images], strict=True))

    def _parts(self, memory: Past | None) -> Sequence[Past | None]:
        return [None] * len(self.blocks) if memory is None else memory.parts(len(self.blocks))

    def _cells(self) -> list[Cell]:
        return [block for block in self.blocks if isinstance(block, Cell)]


@dataclass(frozen=True)
class _Chain:
    """The blocks of one bound cell in order, all reading the tensors they are handed instead of their own."""

    blocks: Sequence[BoundCell]

    def __call__(self, z: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return self.images(z, tensors, last=len(self.blocks))[-1]

    def images(self, z: Tensor, tensors: Mapping[str, Tensor], *, last: int) -> list[Tensor]:
        """What each of the first `last` blocks gives to the next."""
        images = []
        for i, f in enumerate(self.blocks[:last]):
            z = f.evaluate(z, part_of(tensors, i))
            images.append(z)
        return images
