"""A cell added to the table is a cell like any other: configured, trained, saved and loaded by its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from tiny_run import make_recipe, metrics
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from deq_lm import DEQLMConfig, DEQLMForCausalLM
from deq_lm.autocast import Autocast
from deq_lm.cells import BoundCell, Cell, CellConfig, Past
from deq_lm.errors import ConfigError
from deq_lm.modeling import build_config, builders
from deq_lm.training import train


@dataclass(frozen=True, kw_only=True)
class LastTokenConfig(CellConfig):
    """No heads, no feed-forward network: nothing but the contract, and a field of its own."""

    gain: float = 0.5


class LastTokenCell(Cell):
    """f(z)_t = tanh(gain W z_t + V x_{t-1} + x_t), with x_{t-1} from memory at the first position."""

    def __init__(self, config: LastTokenConfig) -> None:
        super().__init__(config)
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.d_model, config.d_model))
        self.before = nn.Parameter(torch.empty(config.d_model, config.d_model))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            parameter.copy_(torch.randn_like(parameter) * self.config.init_std)

    def bind(
        self, x: Tensor, memory: Past | None = None, key_mask: Tensor | None = None, *, sliding: bool = False
    ) -> BoundCell:
        first = torch.zeros_like(x[:, :1]) if memory is None else memory.project(self.project, {})[:, -1:]
        before = torch.cat([first, x[:, :-1]], dim=1) @ self.before
        tensors = {"weight": self.config.gain * self.weight, "injection": x + before}
        return BoundCell(self.evaluate, tensors, {"injection": 0}, x.dtype, Autocast.current(x.device.type), key_mask)

    def project(self, z: Tensor, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        return x

    def evaluate(self, z: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return torch.tanh(z @ tensors["weight"] + tensors["injection"])


@pytest.fixture(autouse=True)
def _in_the_table(monkeypatch):
    monkeypatch.setitem(builders.CELLS, "last_token", (LastTokenConfig, LastTokenCell))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


CELL = {"name": "last_token", "d_model": 16, "mem_len": 1, "init_std": 0.1, "gain": 0.25}


def test_a_cell_of_ones_own_is_trained_saved_and_loaded_by_its_name(tmp_path):
    torch.manual_seed(0)
    model = DEQLMForCausalLM(DEQLMConfig(vocab_size=23, cell=CELL))
    assert isinstance(model.model.layers.cell, LastTokenCell)
    assert model.config.num_attention_heads == 1
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.1, rel=0.2)
    ids = torch.randint(23, (4, 9))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        output = model(ids, labels=ids)
        output.loss.backward()
        assert all(parameter.grad.norm() > 0 for parameter in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    assert losses[2] < losses[0]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.cell == {**CELL, "num_blocks": 1}
    with torch.no_grad():
        memory = model(ids).memory
        assert torch.equal(loaded(ids, memory=memory).logits, model.eval()(ids, memory=memory).logits)


def test_a_whole_run_with_it(tmp_path):
    recipe = make_recipe(tmp_path, "training.max_steps=4", "evaluation.unroll_depths=[4]")
    recipe.model["cell"].clear()
    recipe.model["cell"].update(CELL)
    assert train(recipe) is None
    assert metrics(recipe, "test")


def test_its_settings_are_as_strict_as_any():
    with pytest.raises(ConfigError, match=r"model\.cell\.gian: unknown key; did you mean gain\?"):
        build_config({"cell": {"name": "last_token", "gian": 1.0}}, vocab_size=23)
    with pytest.raises(ConfigError, match=r"model\.cell: d_model=0"):
        build_config({"cell": {"name": "last_token", "d_model": 0}}, vocab_size=23)
    with pytest.raises(ConfigError, match=r"did you mean last_token\?"):
        build_config({"cell": {"name": "last_tokn"}}, vocab_size=23)
