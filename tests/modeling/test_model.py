"""The whole model, tiny and in float64 where it is numerics."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from deq_lm import DEQLMConfig, DEQLMForCausalLM
from deq_lm.errors import ConfigError
from deq_lm.modeling import build_config
from deq_lm.solvers import Outcome, StoppingRule

VOCABULARY = 23
TIGHT = {"max_steps": 200, "rtol": 1e-12, "patience": 30}


def make(
    *, seed: int = 0, dtype: torch.dtype = torch.float64, cell: dict | None = None, **settings
) -> DEQLMForCausalLM:
    torch.manual_seed(seed)
    width = {"name": "transformer_xl", "d_model": 16, "num_heads": 2, "d_inner": 24, "mem_len": 6, "init_std": 0.3}
    settings = {"stopping": TIGHT, "adjoint": {"name": "implicit", "stopping": TIGHT}, **settings}
    config = DEQLMConfig(vocab_size=VOCABULARY, cell={**width, **(cell or {})}, eos_token_id=0, **settings)
    model = DEQLMForCausalLM(config).to(dtype).eval()
    with (
        torch.no_grad()
    ):  # strong injection and weak feedback: a contraction, with one equilibrium that all solvers find
        for name, parameter in model.named_parameters():
            parameter *= 4.0 if "inject" in name else 0.25 if "qkv" in name else 1.0
    return model


def unroll(model: DEQLMForCausalLM, num_layers: int) -> DEQLMForCausalLM:
    """The same weights, `num_layers` deep."""
    config = DEQLMConfig(vocab_size=VOCABULARY, cell=model.config.cell, depth="unrolled", num_layers=num_layers)
    twin = DEQLMForCausalLM(config).to(model.dtype).eval()
    twin.load_state_dict(model.state_dict())
    return twin


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))


def test_implicit_gradient_equals_the_deeply_unrolled_one_for_every_parameter(ids: Tensor):
    model = make()
    gradients = []
    for twin in (model, unroll(model, 150)):
        twin(ids[:, :-1], targets=ids[:, 1:]).loss.backward()
        gradients.append({name: p.grad for name, p in twin.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, wanted in gradients[1].items():
        assert wanted is not None, name
        assert wanted.norm() > 0, name
        assert torch.dist(gradients[0][name], wanted) <= 1e-6 * wanted.norm(), name


def test_the_reversible_model_has_the_same_gradient_and_survives_a_round_trip(ids: Tensor, tmp_path):
    reversible = {"solver": {"name": "reversible"}, "adjoint": {"name": "reversible"}}
    make(**reversible).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert model.config.solver == {"name": "reversible", "relaxation": 0.8, "scope": "prefix"}
    assert model.config.adjoint == {"name": "reversible"}
    twin = unroll(model, 150)
    for one in (model, twin):
        one(ids[:, :-1], targets=ids[:, 1:]).loss.backward()
    for (name, found), wanted in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.dist(found.grad, wanted.grad) <= 1e-6 * wanted.grad.norm(), name
    with pytest.raises(ValueError, match="'reversible' around Broyden: expected the solver Reversible"):
        make(solver={"name": "broyden"}, adjoint={"name": "reversible"})


def test_an_unrolled_model_and_an_equilibrium_have_the_same_parameters():
    model = make()
    assert unroll(model, 3).state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_two_segments_with_memory_equal_one_long_segment(ids: Tensor, norm: str):
    model = make(cell={"norm": norm})
    with torch.no_grad():
        whole = model(ids)
        first = model(ids[:, :6])
        second = model(ids[:, 6:], memory=first.memory)
    assert whole.solution.outcome.tolist() == [Outcome.CONVERGED] * 3
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole.logits, rtol=0, atol=1e-4)
    assert (second.logits - model(ids[:, 6:]).logits).abs().max() > 1e-3  # memory matters
    assert second.memory.length == 6


@pytest.mark.parametrize("solver", ["broyden", "anderson", "picard", "reversible"])
@pytest.mark.parametrize("stopping", [{"max_steps": 3, "rtol": 0.0}, {"max_steps": 40, "rtol": 1e-2}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_do_not_depend_on_later_tokens_in_any_bit(ids: Tensor, solver: str, stopping: dict, dtype: torch.dtype):
    model = make(dtype=dtype, solver={"name": solver}, stopping=stopping)
    with torch.no_grad():
        memory = model(ids[:, :5].flip(1)).memory
        for cut in (1, 6, 11):
            changed = ids.clone()
            changed[:, cut:] = (changed[:, cut:] + 7) % VOCABULARY
            before, after = (model(tokens, memory=memory) for tokens in (ids, changed))
            assert torch.equal(before.logits[:, :cut], after.logits[:, :cut])
            assert not torch.equal(before.logits[:, cut:], after.logits[:, cut:])


def test_a_sequence_alone_and_in_a_batch_give_the_same_logits(ids: Tensor):
    model = make(stopping={"max_steps": 12, "rtol": 1e-3})
    with torch.no_grad():
        together, alone = model(ids), model(ids[1:2])
    torch.testing.assert_close(together.logits[1:2], alone.logits, rtol=0, atol=1e-12)
    assert torch.equal(together.solution.num_evaluations[1:2], alone.solution.num_evaluations)


def test_left_padding_changes_nothing(ids: Tensor):
    model = make()
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.long), ids], dim=1)
    mask = torch.cat([torch.zeros(3, 4), torch.ones(3, 12)], dim=1).long()
    with torch.no_grad():
        found = model(padded, attention_mask=mask).logits[:, 4:]
        torch.testing.assert_close(found, model(ids).logits, rtol=0, atol=1e-9)


def test_the_bytes_saved_for_backward_do_not_depend_on_the_number_of_evaluations(ids: Tensor):
    sizes = {}
    for kind in ("equilibrium", "unrolled"):
        for steps in (4, 64):
            model = make() if kind == "equilibrium" else unroll(make(), steps)
            saved: list[int] = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: (s.append(t.nbytes), t)[1], lambda t: t):
                model(ids, stopping=StoppingRule.fixed(steps - 1), return_logits=False)
            sizes[kind, steps] = sum(saved)
    assert sizes["equilibrium", 4] == sizes["equilibrium", 64] > 0
    assert sizes["unrolled", 64] > 10 * sizes["unrolled", 4]


def test_labels_are_shifted_inside_and_targets_are_not(ids: Tensor):
    model = make()
    with torch.no_grad():
        by_labels = model(ids, labels=ids)
        by_targets = model(ids[:, :-1], targets=ids[:, 1:])
        logits = by_targets.logits.log_softmax(-1)
    expected = -logits.gather(-1, ids[:, 1:, None]).sum()
    torch.testing.assert_close(by_targets.nll_nats.double(), expected.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(by_labels.loss, by_targets.loss, rtol=1e-6, atol=0)
    assert by_labels.num_targets == by_targets.num_targets == 33


def test_a_checkpoint_round_trip_keeps_every_logit_and_the_tie(ids: Tensor, tmp_path):
    model = make(cell={"weight_norm": True})
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}
    assert not list(tmp_path.glob("*.bin"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(loaded) is DEQLMForCausalLM
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)


def test_config_json_holds_every_value_in_force(tmp_path):
    make(solver={"name": "anderson"}).config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["solver"] == {"name": "anderson", "history_size": 6, "relaxation": 1.0, "scope": "prefix"}
    assert saved["adjoint"]["solver"]["name"] == "broyden"
    assert DEQLMConfig.from_pretrained(tmp_path).solver == saved["solver"]


def test_greedy_generation_takes_the_most_likely_token(ids: Tensor):
    model = make()
    model.generation_config.eos_token_id = None
    made = model.generate(ids[:2, :5], max_new_tokens=4, do_sample=False, use_cache=False, pad_token_id=0)
    expected = ids[:2, :5]
    with torch.no_grad():
        for _ in range(4):
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(made, expected)


def test_shallow_pretraining_is_the_unrolled_model(ids: Tensor):
    model = make()
    with torch.no_grad():
        assert torch.equal(model(ids, num_unrolled_steps=2).logits, unroll(model, 2)(ids).logits)


def test_dropout_is_one_mask_a_solve_so_that_the_solve_converges_and_backward_repeats(ids: Tensor):
    model = make(cell={"dropout": 0.3}).train()
    output = model(ids[:, :-1], targets=ids[:, 1:])
    assert output.solution.outcome.tolist() == [Outcome.CONVERGED] * 3
    parameters = list(model.parameters())
    first = torch.autograd.grad(output.loss, parameters, retain_graph=True)
    second = torch.autograd.grad(output.loss, parameters)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(output.logits, model(ids[:, :-1]).logits)  # the next solve draws another mask


def test_mixed_precision_trains_and_is_left_before_backward(ids: Tensor):
    model = make(dtype=torch.float32, stopping={"max_steps": 12, "rtol": 1e-2}).train()
    gradients = []
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = model(ids[:, :-1], targets=ids[:, 1:]).loss
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    mixed, full = (torch.cat([gradient.flatten() for gradient in all_of]) for all_of in gradients)
    assert torch.cosine_similarity(mixed, full, dim=0) > 0.98
    assert torch.dist(mixed, full) > 0  # the autocast did reach the cell


def test_a_model_in_half_precision_scores_trains_and_keeps_its_solver_state_in_float32(ids: Tensor, tmp_path):
    model = make(dtype=torch.float32, stopping={"max_steps": 12, "rtol": 1e-2})
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    first = half(ids[:, :6], targets=ids[:, 1:7])
    second = half(ids[:, 6:-1], targets=ids[:, 7:], memory=first.memory)
    second.loss.backward()
    assert half.dtype == torch.bfloat16
    assert first.solution.z.dtype == torch.float32
    exact = model(ids[:, :6], targets=ids[:, 1:7])
    torch.testing.assert_close(first.loss, exact.loss, rtol=0.05, atol=0)
    assert all(parameter.grad.isfinite().all() for parameter in half.parameters())


def test_the_adjoint_solve_is_reported(ids: Tensor):
    model = make()
    assert model.adjoint_solution is None
    model(ids[:, :-1], targets=ids[:, 1:]).loss.backward()
    assert model.adjoint_solution.outcome.tolist() == [Outcome.CONVERGED] * 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": {"name": "broydn"}}, "model.solver.name.*did you mean broyden"),
        ({"solver": {"name": "broyden", "history": 3}}, "model.solver.history: unknown key; did you mean history_size"),
        ({"solver": {"name": "picard", "relaxation": 2.0}}, "Picard"),
        ({"stopping": {"max_step": 3}}, "model.stopping.max_step: unknown key; did you mean max_steps"),
        ({"depth": "deep"}, "model.depth"),
        ({"depth": "unrolled"}, "num_layers"),
        ({"num_layers": 3}, "num_layers"),
        ({"depth": "unrolled", "num_layers": 0}, "num_layers"),
        ({"cell": {"name": "transformer_xl", "d_model": 10, "num_heads": 3}}, "num_heads"),
        (
            {"adjoint": {"name": "implicit", "solver": {"name": "anderson", "scop": "prefix"}}},
            "model.adjoint.solver.scop",
        ),
    ],
)
def test_a_wrong_setting_names_its_place_and_the_nearest_right_one(settings: dict, message: str):
    mapping = {"cell": {"name": "transformer_xl", "d_model": 16, "num_heads": 2}, **settings}
    with pytest.raises(ConfigError, match=message):
        build_config(mapping, vocab_size=VOCABULARY)


def test_arguments_that_would_be_ignored_are_refused(ids: Tensor):
    model = make()
    with pytest.raises(ValueError, match="output_attentions"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="not both"):
        model(ids, labels=ids, targets=ids)
