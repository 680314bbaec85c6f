"""A bound cell of some of the sequences is the whole one, cut."""

import pytest
import torch
from torch import Tensor

from deq_lm.cells import Memory, TransformerXLConfig
from deq_lm.modeling.builders import build_cell

VARIANTS = {
    "plain": {},
    "attention": {"injection": "attention"},
    "dropout": {"dropout": 0.3},
    "blocks": {"num_blocks": 2, "dropout": 0.3},
}


def states(*shape: int, seed: int) -> Tensor:
    return torch.randn(3, *shape, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("with_memory", [False, True], ids=["no_memory", "memory"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_some_sequences_are_computed_as_all_are(name: str, with_memory: bool, padded: bool):
    torch.manual_seed(0)
    options = {"injection": "both", **VARIANTS[name]}
    num_blocks = options.get("num_blocks", 1)
    cell = build_cell(TransformerXLConfig(d_model=8, num_heads=2, d_inner=12, init_std=0.4, **options)).double()
    mask = torch.tensor([[True] * 5, [False] + [True] * 4, [False] * 2 + [True] * 3]) if padded else None
    memory = None
    if with_memory:
        past = torch.cat([states(4, seed=3)] * num_blocks, dim=-1)
        memory = Memory(past, states(4, seed=4), None if mask is None else mask[:, :4])
    f = cell.bind(states(5, seed=1), memory, mask)
    z = states(5, seed=2)
    for part in (slice(0, 1), slice(1, 3), slice(0, 3)):
        torch.testing.assert_close(f.select(part)(z[part]), f(z)[part], rtol=1e-12, atol=1e-12)
