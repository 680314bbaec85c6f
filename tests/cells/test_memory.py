"""What a segment leaves to the next: the last positions, with padding marked where it was, taken apart and put together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deq_lm.cells import Memory

BATCH, WIDTH = 2, 8


def states(length: int, seed: int, width: int = WIDTH) -> Tensor:
    return torch.randn(BATCH, length, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("max_length", [2, 4, 7, 20])
def test_memory_marks_padding_where_it_was(max_length: int):
    num_pads = (0, 2)
    masks = [torch.arange(4).expand(BATCH, 4) >= torch.tensor(num_pads)[:, None], None, torch.rand(BATCH, 3) > 0.5]
    memory, everything = None, []
    for mask, length in zip(masks, (4, 1, 3), strict=True):
        memory = Memory.extend(memory, states(length, 1), states(length, 2), max_length)
        if mask is not None:
            memory = memory.mark_padding(mask)
        everything.append(torch.ones(BATCH, length, dtype=torch.bool) if mask is None else mask)
    assert memory is not None
    assert torch.equal(memory.mask, torch.cat(everything, 1)[:, -max_length:])
    assert memory.mask.shape == memory.z.shape[:2]


def test_parts_of_several_blocks_are_joined_again():
    mask = torch.tensor([[False, True, True]] * BATCH)
    memory = Memory(states(3, 1, 3 * WIDTH), states(3, 2), mask)
    parts = memory.parts(3)
    assert [part.z.shape for part in parts] == [(BATCH, 3, WIDTH)] * 3
    assert all(torch.equal(part.x, memory.x) and torch.equal(part.mask, mask) for part in parts)
    joined = Memory.joined(parts)
    assert joined is not None
    assert torch.equal(joined.z, memory.z)
    assert torch.equal(joined.x, memory.x)
    assert Memory.joined([None, None]) is None
