"""The model with each kind of embedding: full, the default, and adaptive."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from missing_weights import reload_without
from safetensors.torch import load_file
from tiny_run import make_recipe, metrics, recipe_mapping
from torch import Tensor
from transformers import AutoModelForCausalLM

from deq_lm import DEQLMConfig, DEQLMForCausalLM
from deq_lm.errors import ConfigError, UnusedSettingWarning
from deq_lm.heads import AdaptiveEmbedding, AdaptiveSoftmax, LinearHead
from deq_lm.modeling import build_config
from deq_lm.structure import build
from deq_lm.training import train
from deq_lm.training.recipe import Recipe

VOCABULARY = 23
CELL = {"name": "transformer_xl", "d_model": 16, "num_heads": 2, "d_inner": 24, "mem_len": 6, "init_std": 0.3}
ADAPTIVE = {"name": "adaptive", "cutoffs": [5, 11], "div_val": 2}
KINDS = {
    "adaptive": ADAPTIVE,
    "tied": {**ADAPTIVE, "tie_first_projection": True},
    "narrow": {**ADAPTIVE, "d_embed": 8},
    "one table": {"name": "adaptive", "cutoffs": [5, 11], "div_val": 1},
}


def make(embedding: dict | None = None, *, dtype: torch.dtype = torch.float64, **settings) -> DEQLMForCausalLM:
    """A contraction, with biases that are not 0."""
    torch.manual_seed(0)
    settings = {"stopping": {"max_steps": 60, "rtol": 1e-10}, **settings}
    config = DEQLMConfig(vocab_size=VOCABULARY, cell=CELL, embedding=embedding or ADAPTIVE, **settings)
    model = DEQLMForCausalLM(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter *= 4.0 if "inject" in name else 0.25 if "qkv" in name else 1.0
            parameter += 0.1 * torch.randn_like(parameter) if name.startswith("lm_head") else 0.0
    return model


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))


def test_the_default_is_one_table_tied_to_a_linear_head():
    model = DEQLMForCausalLM(DEQLMConfig(vocab_size=VOCABULARY, cell=CELL))
    assert model.config.embedding == {"name": "full"}
    assert type(model.model.embed_tokens) is torch.nn.Embedding
    assert type(model.lm_head) is LinearHead
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert [name for name in model.state_dict() if ".layers." not in name] == [
        "model.embed_tokens.weight",
        "lm_head.weight",
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_logits_belong_together(ids: Tensor, kind: str):
    model = make(KINDS[kind])
    assert isinstance(model.lm_head, AdaptiveSoftmax)
    assert (model.lm_head.projection is None) is (kind in ("tied", "one table"))
    assert model.model.embed_tokens.clusters.d_embed == (8 if kind == "narrow" else 16)
    with torch.no_grad():
        output = model(ids[:, :-1], targets=ids[:, 1:])
        last = model(ids[:, :-1], logits_to_keep=2).logits
    assert output.logits.shape == (3, 11, VOCABULARY)
    assert output.logits.dtype == torch.float32
    expected = -output.logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).sum()
    torch.testing.assert_close(output.nll_nats.float(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(last, output.logits[:, -2:])


def test_the_implicit_gradient_equals_the_deeply_unrolled_one_for_every_parameter(ids: Tensor):
    tight = {"max_steps": 200, "rtol": 1e-12, "patience": 30}
    model = make(stopping=tight, adjoint={"name": "implicit", "stopping": tight})
    twin = DEQLMForCausalLM(
        DEQLMConfig(vocab_size=VOCABULARY, cell=CELL, embedding=ADAPTIVE, depth="unrolled", num_layers=150)
    )
    twin.double().load_state_dict(model.state_dict())
    for one in (model, twin):
        one(ids[:, :-1], targets=ids[:, 1:]).loss.backward()
    for (name, found), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert expected.grad.norm() > 0, name
        assert torch.dist(found.grad, expected.grad) <= 1e-6 * expected.grad.norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_probabilities_do_not_depend_on_later_tokens_in_any_bit(ids: Tensor, dtype: torch.dtype):
    model = make(dtype=dtype, stopping={"max_steps": 3, "rtol": 0.0})
    with torch.no_grad():
        for cut in (1, 6, 11):
            changed = ids.clone()
            changed[:, cut:] = (changed[:, cut:] + 9) % VOCABULARY  # to another cluster
            before, after = model(ids).logits, model(changed).logits
            assert torch.equal(before[:, :cut], after[:, :cut])
            assert not torch.equal(before[:, cut:], after[:, cut:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_round_trip_keeps_every_logit_and_saves_nothing_twice(ids: Tensor, kind: str, tmp_path: Path):
    model = make(KINDS[kind])
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == dict(model.named_parameters()).keys()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert loaded.config.embedding == model.config.embedding
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        loaded.model.embed_tokens.tables[0].weight += 1.0
        assert not torch.equal(loaded(ids).logits, model(ids).logits)


def test_input_and_output_stay_tied_when_the_model_is_copied_and_converted(ids: Tensor):
    model = copy.deepcopy(make()).float().double()
    embedding, hidden = model.model.embed_tokens, torch.ones(1, 1, 16, dtype=torch.float64)
    with torch.no_grad():
        before = model.lm_head.logits(hidden, embedding)
        embedding.tables[1].weight[0] += 1.0  # the word 5
        after = model.lm_head.logits(hidden, embedding)
    changed = (before != after).squeeze()
    assert changed.nonzero().flatten().tolist() == [*range(5, 11)]  # its cluster


def test_a_config_json_of_before_there_was_a_choice_is_that_of_a_full_embedding(tmp_path: Path):
    make({"name": "full"}).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved.pop("embedding") == {"name": "full"}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.embedding == {"name": "full"}


@pytest.mark.parametrize(
    "missing", ["tables.1.weight", "embed_tokens.projection", "lm_head.projection", "lm_head.bias", "cluster_", "embed"]
)
def test_weights_missing_from_a_checkpoint_are_drawn_and_all_others_loaded(tmp_path: Path, missing: str):
    loaded, names = reload_without(make(dtype=torch.float32), missing, tmp_path)
    found = dict(loaded.named_parameters())
    for name in names:
        if "bias" in name:
            assert not found[name].any()
        elif found[name].numel() > 30:
            assert found[name].std().item() == pytest.approx(0.3, rel=0.4), name


def test_a_model_made_without_storage_is_drawn_when_it_has_some():
    config = DEQLMConfig(vocab_size=1000, cell={**CELL, "d_model": 64}, embedding={**ADAPTIVE, "cutoffs": [200, 500]})
    with torch.device("meta"):
        model = DEQLMForCausalLM(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    torch.manual_seed(0)
    model.init_weights()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    for name, parameter in [*model.model.embed_tokens.named_parameters(), *model.lm_head.named_parameters()]:
        assert parameter.std().item() == pytest.approx(0.0 if "bias" in name else 0.3, rel=0.2), name


def test_every_parameter_is_counted_once():
    model = make(dtype=torch.float32)
    tables = 5 * 16 + 6 * 8 + 12 * 4
    own = 16 * (16 + 8 + 4) + 16 * 16 + VOCABULARY + 2 * 16 + 2
    cell = sum(parameter.numel() for parameter in model.model.layers.parameters())
    assert model.num_parameters() == cell + tables + own
    assert model.num_parameters(exclude_embeddings=True) == cell + own


def test_greedy_generation_takes_the_most_likely_token(ids: Tensor):
    model = make()
    made = model.generate(ids[:2, :5], max_new_tokens=3, do_sample=False, use_cache=False, pad_token_id=0)
    expected = ids[:2, :5]
    with torch.no_grad():
        for _ in range(3):
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(made, expected)


def test_an_adaptive_embedding_is_not_resized():
    model = make()
    assert isinstance(model.get_input_embeddings(), AdaptiveEmbedding)
    with pytest.raises(ValueError, match=r"resize_token_embeddings\(30\).*'adaptive'.*Make a new model"):
        model.resize_token_embeddings(30)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [17, 30])
def test_a_full_embedding_is_resized_and_the_model_still_scores(tied: bool, size: int):
    model = make({"name": "full"}, dtype=torch.float32, tie_word_embeddings=tied)
    first = model.lm_head.weight[:17].clone()
    model.resize_token_embeddings(size, mean_resizing=False)
    assert type(model.lm_head) is LinearHead
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert torch.equal(model.lm_head.weight[:17], first)
    tokens = torch.arange(12)[None] + size - 12
    output = model(tokens, labels=tokens)
    assert output.logits.shape == (1, 12, size)
    assert output.loss.isfinite()


@pytest.mark.parametrize(
    ("embedding", "message"),
    [
        ({"name": "adaptive"}, "model.embedding: missing cutoffs"),
        ({"name": "adaptiv", "cutoffs": [5]}, "model.embedding.name: the text 'adaptiv' is not known; did you mean"),
        ({**ADAPTIVE, "div": 4}, "model.embedding.div: unknown key; did you mean div_val"),
        ({"name": "full", "div_val": 4}, "model.embedding.div_val: unknown key"),
        ({**ADAPTIVE, "cutoffs": [5, 23]}, "model.embedding: cutoffs=[5, 23] with a vocabulary of 23"),
        ({**ADAPTIVE, "cutoffs": []}, "model.embedding: cutoffs=[]"),
        ({**ADAPTIVE, "div_val": 8}, "model.embedding: div_val=8 with d_embed=16 and 2 cutoffs"),
        ({**ADAPTIVE, "d_embed": 0}, "model.embedding: d_embed=0"),
    ],
)
def test_a_wrong_setting_names_its_place_and_what_is_allowed(embedding: dict, message: str):
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_config({"cell": CELL, "embedding": embedding}, vocab_size=VOCABULARY)


def test_an_adaptive_model_cannot_be_untied():
    with pytest.raises(ConfigError, match=r"model\.embedding: adaptive with tie_word_embeddings=False"):
        make(tie_word_embeddings=False)


def test_tying_a_projection_that_is_not_there_warns():
    with pytest.warns(UnusedSettingWarning, match=r"model\.embedding\.tie_first_projection=true with div_val=1"):
        DEQLMConfig(vocab_size=VOCABULARY, cell=CELL, embedding={**KINDS["one table"], "tie_first_projection": True})


def test_a_recipe_whose_cutoffs_the_tokenizer_will_not_reach_is_refused_with_the_recipe(tmp_path: Path):
    mapping = recipe_mapping(tmp_path)
    mapping["model"]["embedding"] = {"name": "adaptive", "cutoffs": [100, 20_000], "div_val": 2}
    with pytest.raises(ConfigError, match=r"model\.embedding: cutoffs=\[100, 20000\] with a vocabulary of 300"):
        build(Recipe, mapping)
    mapping["data"] |= {"tokenizer": "word_level", "vocab_size": None}  # as many words as there will be
    assert build(Recipe, mapping).model["embedding"]["cutoffs"] == [100, 20_000]


def test_a_whole_run_with_it_can_be_resumed(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    recipes = []
    for name in ("whole", "parts"):
        recipe = make_recipe(tmp_path, f"training.output_dir={tmp_path / name}", "training.max_steps=4")
        recipe.model["embedding"] = {"name": "adaptive", "cutoffs": [100, 200], "div_val": 2}
        recipes.append(recipe)
    whole, parts = recipes
    train(whole)
    short = make_recipe(tmp_path, f"training.output_dir={tmp_path / 'parts'}", "training.max_steps=2")
    short.model["embedding"] = parts.model["embedding"]
    train(short)
    train(parts, resume=True)
    assert metrics(whole, "test")[-1]["nats_per_token"] == metrics(parts, "test")[-1]["nats_per_token"]
    first, second = (load_file(tmp_path / name / "final/model.safetensors") for name in ("whole", "parts"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
