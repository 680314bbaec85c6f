"""A cell of several blocks is the blocks one after the other, each with a memory of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deq_lm.adjoints import Implicit
from deq_lm.cells import ComposedCell, Memory, TransformerXLConfig
from deq_lm.equilibrium import Equilibrium
from deq_lm.modeling.builders import build_cell
from deq_lm.solvers import Picard, StoppingRule

BATCH, LENGTH, PAST, WIDTH, BLOCKS = 2, 5, 3, 8, 3


def make(**options) -> ComposedCell:
    torch.manual_seed(0)
    sizes = {"d_model": WIDTH, "num_heads": 2, "d_inner": 12, "mem_len": 20, "init_std": 0.1, "num_blocks": BLOCKS}
    cell = build_cell(TransformerXLConfig(**{**sizes, **options})).double().eval()
    assert isinstance(cell, ComposedCell)
    with torch.no_grad():
        for block in cell.blocks:
            block.output_norm.weight *= 0.7  # together a contraction
    return cell


def states(length: int, seed: int, width: int = WIDTH) -> Tensor:
    return torch.randn(BATCH, length, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_it_is_its_blocks_in_order_with_weights_of_their_own():
    cell = make()
    assert len({parameter.sum().item() for name, parameter in cell.named_parameters() if "qkv" in name}) == BLOCKS
    z, x = states(LENGTH, 1), states(LENGTH, 2)
    memory = Memory(states(PAST, 3, BLOCKS * WIDTH), states(PAST, 4))
    expected = z
    for i, block in enumerate(cell.blocks):
        past = Memory(memory.z[..., i * WIDTH : (i + 1) * WIDTH], memory.x)
        expected = block.bind(x, past)(expected)
    assert torch.equal(cell.bind(x, memory)(z), expected)


def test_two_segments_with_memory_are_one_long_segment():
    cell = make()
    rule = StoppingRule(max_steps=300, rtol=1e-13)
    equilibrium = Equilibrium(cell, solver=Picard(), stopping=rule).eval()
    x = 3 * states(PAST + LENGTH, 2)
    with torch.no_grad():
        whole = equilibrium(x)
        first = equilibrium(x[:, :PAST])
        second = equilibrium(x[:, PAST:], first.memory)
    assert whole.solution.converged.all()
    assert first.memory.z.shape == (BATCH, PAST, BLOCKS * WIDTH)
    torch.testing.assert_close(second.output, whole.output[:, PAST:], rtol=0, atol=1e-10)
    torch.testing.assert_close(second.memory.z, whole.memory.z, rtol=0, atol=1e-10)
    with torch.no_grad():  # and the memory matters
        assert not torch.allclose(equilibrium(x[:, PAST:]).output, second.output, atol=1e-3)


def test_the_implicit_gradient_reaches_every_block_and_is_the_unrolled_one():
    cell = make()
    x = 3 * states(LENGTH, 2)
    gradients = []
    tight = StoppingRule(max_steps=300, rtol=1e-12)
    for layer in (
        Equilibrium(cell, stopping=tight, adjoint=Implicit(stopping=tight)),
        Equilibrium.unrolled(cell, 200),
    ):
        output = layer(x).output
        gradients.append(torch.autograd.grad(output, list(cell.parameters()), states(LENGTH, 5)))
    for found, wanted in zip(*gradients, strict=True):
        assert wanted.norm() > 0
        assert torch.dist(found, wanted) <= 1e-6 * wanted.norm()


def test_without_memory_nothing_is_evaluated_for_it():
    cell = make(mem_len=0)
    x, z = states(LENGTH, 2), states(LENGTH, 1)
    f = cell.bind(x)
    for block in cell.blocks:
        block.evaluate = None
    assert cell.remember(f, z, x, None) is None


def test_padding_changes_nothing_for_the_rest():
    cell = make()
    z, x = states(LENGTH, 1), states(LENGTH, 2)
    padded_z, padded_x = torch.cat([states(4, 5), z], 1), torch.cat([states(4, 6), x], 1)
    mask = torch.tensor([[False] * 4 + [True] * LENGTH] * BATCH)
    with torch.no_grad():
        found = cell.bind(padded_x, key_mask=mask)(padded_z)
        torch.testing.assert_close(found[:, 4:], cell.bind(x)(z), rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_new_parameters_are_drawn_for_every_block(num_blocks: int):
    cell = build_cell(TransformerXLConfig(d_model=64, d_inner=64, init_std=0.03, num_blocks=num_blocks))
    for parameter in cell.parameters():
        torch.nn.init.zeros_(parameter)
    cell.reset_parameters()
    spreads = [p.std().item() for name, p in cell.named_parameters() if name.endswith("qkv.weight")]
    assert spreads == pytest.approx([0.03] * num_blocks, rel=0.05)
