"""What a segment leaves to the next: the last positions, with padding marked where it was, taken apart and put together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deq_lm.cells import Memory, ProjectedMemory

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
    assert torch.equal(joined.z, memory.z)
    assert torch.equal(joined.x, memory.x)


def test_projected_parts_of_several_blocks_are_joined_again_with_the_weights_of_each():
    mask = torch.tensor([[False, True, True]] * BATCH)
    weights = {"0.qkv": states(1, 1), "0.1.qkv": states(1, 2), "1.qkv": states(1, 3)}
    memory = ProjectedMemory(states(3, 4, 2 * WIDTH), mask, weights)
    parts = memory.parts(2)
    assert [set(part.weights) for part in parts] == [{"qkv", "1.qkv"}, {"qkv"}]
    assert torch.equal(parts[1].features, memory.features[..., WIDTH:])
    joined = ProjectedMemory.joined(parts)
    assert torch.equal(joined.features, memory.features)
    assert torch.equal(joined.mask, mask)
    assert joined.weights.keys() == weights.keys()
    assert all(joined.weights[name] is tensor for name, tensor in weights.items())


def test_a_projected_memory_keeps_the_newest_positions_and_where_padding_was():
    mask = torch.tensor([[False, True, True]] * BATCH)
    first = ProjectedMemory(states(3, 1), mask)
    longer = first.extended(states(2, 2), 4)
    assert torch.equal(longer.features, torch.cat([states(3, 1), states(2, 2)], dim=1)[:, -4:])
    assert longer.mask.tolist() == [[True] * 4] * BATCH
    assert first.extended(states(2, 2), 5).mask[:, 0].tolist() == [False] * BATCH
    assert torch.equal(longer.without_newest(2).features, first.features[:, 1:])
    assert torch.equal(longer.select(torch.tensor([1, 1])).features[0], longer.features[1])


@pytest.mark.parametrize("max_length", [2, 20])
def test_the_past_counts_the_tokens_of_its_text_and_no_padding(max_length: int):
    mask = torch.tensor([[False, False, True, True], [True] * 4])
    memory = Memory.extend(None, states(4, 1), states(4, 2), max_length).mark_padding(mask)
    memory = Memory.extend(memory, states(3, 3), states(3, 4), max_length)
    assert memory.count().tolist() == [5, 7]
    assert memory.share(1, 2).count().tolist() == [7]
    assert Memory.joined(memory.parts(2)).count().tolist() == [5, 7]
    bare = Memory(memory.z, memory.x, memory.mask)  # the text begins with it
    assert bare.count().tolist() == ([5, 7] if max_length == 20 else [2, 2])

    past = ProjectedMemory(memory.z, memory.mask, num_tokens=memory.num_tokens)
    past = past.extended(states(2, 5), max_length).mark_padding(torch.tensor([[True, False], [True, True]]))
    assert past.count().tolist() == [6, 9]
    assert past.select(torch.tensor([1, 1, 0])).count().tolist() == [9, 9, 6]
    assert ProjectedMemory.joined(past.parts(2)).count().tolist() == [6, 9]
    assert past.without_newest(2).count().tolist() == [5, 7]
