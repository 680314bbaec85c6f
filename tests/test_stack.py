"""A stack is an ordinary transformer of the same cells: Transformer-XL, where they have no injection."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deq_lm import DEQLMConfig, DEQLMForCausalLM
from deq_lm.cells import Memory, TransformerXLCell, TransformerXLConfig
from deq_lm.errors import ConfigError, UnusedSettingWarning
from deq_lm.modeling import build_config
from deq_lm.solvers import StoppingRule
from deq_lm.stack import Stack

VOCABULARY = 23
CELL = {"name": "transformer_xl", "d_model": 16, "num_heads": 2, "d_inner": 24, "mem_len": 7, "init_std": 0.3}


def make(**cell) -> DEQLMForCausalLM:
    torch.manual_seed(0)
    config = DEQLMConfig(
        vocab_size=VOCABULARY, depth="stack", num_layers=3, cell={**CELL, "injection": "none", **cell}, eos_token_id=0
    )
    return DEQLMForCausalLM(config).double().eval()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))


def test_layers_follow_each_other_from_the_embedded_tokens_and_remember_what_they_were_given():
    torch.manual_seed(0)
    cells = [TransformerXLCell(TransformerXLConfig(d_model=8, num_heads=2, d_inner=12, mem_len=3)) for _ in range(2)]
    x, past = torch.randn(2, 5, 8), torch.randn(2, 3, 16)
    with torch.no_grad():
        found = Stack(cells)(x, Memory(past, torch.zeros(2, 3, 8)))
        h = cells[0].bind(x, Memory(past[..., :8], torch.zeros(2, 3, 8)))(x)
        out = cells[1].bind(x, Memory(past[..., 8:], torch.zeros(2, 3, 8)))(h)
    assert torch.equal(found.output, out)
    assert torch.equal(found.memory.z, torch.cat([x, h], dim=-1)[:, -3:])
    assert found.solution is None


@pytest.mark.parametrize("injection", ["none", "attention", "residual"])
def test_two_segments_with_memory_are_one_long_segment(ids: Tensor, injection: str):
    model = make(injection=injection)
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :7])
        second = model(ids[:, 7:], memory=first.memory).logits
    torch.testing.assert_close(torch.cat([first.logits, second], 1), whole, rtol=0, atol=1e-5)


def test_the_future_changes_nothing_before(ids: Tensor):
    model = make()
    changed = ids.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % VOCABULARY
    with torch.no_grad():
        assert torch.equal(model(ids).logits[:, :6], model(changed).logits[:, :6])


def test_every_layer_has_parameters_of_its_own_and_all_learn(ids: Tensor):
    model = make()
    model(ids, labels=ids).loss.backward()
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters() if "qkv" in name}
    assert len(norms) == len(set(norms.values())) == 3
    assert all(norms.values())
    assert not any("inject" in name for name, _ in model.named_parameters())


def test_a_checkpoint_brings_every_layer_back(ids: Tensor, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    loaded = DEQLMForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    del model
    assert loaded.generate(ids[:, :3], max_new_tokens=4, do_sample=False).shape[1] <= 7


def test_what_only_a_solve_has_is_refused(ids: Tensor):
    with pytest.raises(ValueError, match="stopping: a stack of layers solves nothing"):
        make()(ids, stopping=StoppingRule())
    with pytest.warns(
        UnusedSettingWarning, match="no effect with model.depth=stack, which solves nothing: model.solver"
    ):
        build_config({"cell": CELL, "depth": "stack", "num_layers": 2, "solver": {"name": "picard"}}, vocab_size=23)
    with pytest.raises(ConfigError, match="give num_layers to an unrolled model or a stack"):
        build_config({"cell": CELL, "depth": "stack"}, vocab_size=23)
    with pytest.raises(ConfigError, match=r"model\.cell: one without injection in a model of depth equilibrium"):
        build_config({"cell": {**CELL, "injection": "none"}}, vocab_size=23)
