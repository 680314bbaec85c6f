"""What a checkpoint brings back, and how weights are drawn that it does not bring."""

from __future__ import annotations

import json

import pytest
import torch
from missing_weights import reload_without
from tiny_model import make
from torch import Tensor
from transformers import AutoModelForCausalLM

from deq_lm import DEQLMConfig, DEQLMForCausalLM
from deq_lm.cells import TransformerXLCell


def test_a_checkpoint_round_trip_keeps_every_logit_and_the_tie(ids: Tensor, tmp_path):
    model = make(cell={"weight_norm": True})
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}
    assert not list(tmp_path.glob("*.bin"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(loaded) is DEQLMForCausalLM
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).last_hidden_state, model(ids).last_hidden_state)


def test_config_json_holds_every_value_in_force(tmp_path):
    make(solver={"name": "anderson"}).config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["solver"] == {
        "name": "anderson",
        "history_size": 6,
        "relaxation": 1.0,
        "scope": "prefix",
        "restart_growth": 1.0,
        "half_precision_history": False,
    }
    assert saved["adjoint"]["solver"]["name"] == "broyden"
    assert DEQLMConfig.from_pretrained(tmp_path).solver == saved["solver"]


@pytest.mark.parametrize("weight_norm", [False, True])
@pytest.mark.parametrize("missing", ["output_norm.bias", "content_bias", "expand.bias", "inject"])
def test_weights_missing_from_a_checkpoint_are_drawn_and_all_others_loaded(tmp_path, missing: str, weight_norm: bool):
    model = make(dtype=torch.float32, cell={"weight_norm": weight_norm})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01  # biases and gains are not what they start as
    loaded, _ = reload_without(model, missing, tmp_path)
    assert all(parameter.isfinite().all() for parameter in loaded.parameters())


def test_a_model_made_without_storage_is_drawn_when_it_has_some():
    torch.manual_seed(0)
    config = make().config
    with torch.device("meta"):
        model = DEQLMForCausalLM(config)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    model.init_weights()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model.model.layers.cell.qkv.weight.std().item() == pytest.approx(0.3, rel=0.1)


def test_a_constructor_draws_the_cell_once(monkeypatch):
    calls = []
    monkeypatch.setattr(TransformerXLCell, "reset_parameters", lambda self: calls.append(self))
    make()
    assert len(calls) == 1
