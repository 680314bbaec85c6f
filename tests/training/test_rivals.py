"""The equilibrium and its rivals of the same cells learn what all of them can learn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deq_lm import DEQLMForCausalLM
from deq_lm.modeling import build_config, matching_stack

VOCABULARY = 12
CELL = {"name": "transformer_xl", "d_model": 24, "num_heads": 2, "d_inner": 96, "mem_len": 8, "init_std": 0.1}
DEQ = {"cell": CELL, "stopping": {"max_steps": 12, "rtol": 1e-2}}
RIVALS = {
    "equilibrium": DEQ,
    "equilibrium of two blocks": {**DEQ, "cell": {**CELL, "num_blocks": 2}},
    "unrolled": {"cell": CELL, "depth": "unrolled", "num_layers": 8},
    "checkpointed": {"cell": {**CELL, "recompute": "block"}, "depth": "unrolled", "num_layers": 8},
    "stack": matching_stack(DEQ, 2, VOCABULARY),
}


def counting(batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Sequences that count in steps of 1 or 2, modulo the vocabulary; the first token says which: two tell the third."""
    start = torch.randint(VOCABULARY, (batch, 1), generator=generator)
    return (start + (1 + start % 2) * torch.arange(length)) % VOCABULARY


def final_loss(model: dict) -> float:
    """Nats per token after some training: ln 2 without a look at the token before, 0 with one."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    network = DEQLMForCausalLM(build_config(model, VOCABULARY)).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    losses = []
    for _ in range(200):
        ids = counting(16, 9, generator)
        output = network(ids[:, :-1], targets=ids[:, 1:], return_logits=False)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    return sum(losses[-10:]) / 10


@pytest.mark.parametrize("name", RIVALS)
def test_what_all_can_learn_all_learn(name: str):
    assert final_loss(RIVALS[name]) < 0.02
