"""The whole model, tiny and in float64 where it is numerics."""

from __future__ import annotations

import re

import pytest
import torch
from tiny_model import VOCABULARY, make
from torch import Tensor
from transformers import AutoModelForCausalLM

from deq_lm import DEQLMConfig, DEQLMForCausalLM
from deq_lm.adjoints import Adjoint, Phantom, Reversed, Unrolled
from deq_lm.cells import Memory
from deq_lm.errors import ConfigError, UnusedSettingWarning
from deq_lm.modeling import build_config
from deq_lm.solvers import Outcome, StoppingRule


def unroll(model: DEQLMForCausalLM, num_layers: int) -> DEQLMForCausalLM:
    """The same weights, `num_layers` deep."""
    config = DEQLMConfig(vocab_size=VOCABULARY, cell=model.config.cell, depth="unrolled", num_layers=num_layers)
    twin = DEQLMForCausalLM(config).to(model.dtype).eval()
    twin.load_state_dict(model.state_dict())
    return twin


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


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stopping": {"max_steps": 5, "rtol": 1e-12}, "adjoint": {"name": "implicit", "stopping": {"max_steps": 5}}},
        {"adjoint": {"name": "implicit", "solver": {"name": "anderson"}}},
        {"adjoint": {"name": "phantom"}},
        {"adjoint": {"name": "jacobian_free"}},
        {"solver": {"name": "reversible"}, "adjoint": {"name": "reversible"}},
        {"depth": "unrolled", "num_layers": 6, "stopping": {}, "adjoint": {"name": "implicit"}},
    ],
    ids=["implicit", "implicit, cut short", "anderson", "phantom", "jacobian_free", "reversible", "unrolled"],
)
def test_what_a_position_predicts_has_no_gradient_at_later_tokens(ids: Tensor, settings: dict):
    model, embedded = make(**settings), []
    model.model.embed_tokens.register_forward_hook(lambda _module, _inputs, output: embedded.append(output))
    logits = model(ids).logits
    position = ids.shape[1] // 2
    (gradient,) = torch.autograd.grad(logits[:, position].square().sum(), embedded)
    assert (gradient[:, position + 1 :] == 0).all()
    assert (gradient[:, : position + 1] != 0).any(dim=2).all()


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
    found = torch.cat([first.last_hidden_state, second.last_hidden_state], 1)
    torch.testing.assert_close(found, whole.last_hidden_state, rtol=0, atol=1e-9)
    assert (second.last_hidden_state - model(ids[:, 6:]).last_hidden_state).abs().max() > 1e-3  # memory matters
    assert second.memory.length == 6


PRECISIONS = {
    "float64": (torch.float64, False),
    "float32": (torch.float32, False),
    "bfloat16": (torch.bfloat16, False),
    "mixed": (torch.float32, True),
}


@pytest.mark.parametrize("solver", ["broyden", "anderson", "picard", "reversible"])
@pytest.mark.parametrize("max_steps", [1, 2, 5, 12, 30])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_logits_do_not_depend_on_later_tokens_in_any_bit(solver: str, max_steps: int, precision: str):
    """At every budget and tolerance, of feedback too strong for most of these solves to converge."""
    dtype, mixed = PRECISIONS[precision]
    model = make(dtype=dtype, solver={"name": solver}, cell={"init_std": 1.2})
    draw = torch.Generator().manual_seed(2)
    cuts = torch.tensor([1, 3, 6, 11])
    ids, other, past = (torch.randint(VOCABULARY, (4, 12), generator=draw) for _ in range(3))
    is_later = torch.arange(12) >= cuts[:, None]
    changed = torch.where(is_later, other, ids)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        memory = model(past, stopping=StoppingRule.fixed(2)).memory
        for rtol in (0.0, 1e-1, 1e-3, 1e-6):
            rule = StoppingRule(max_steps=max_steps, rtol=rtol)
            before, after = (model(tokens, memory=memory, stopping=rule) for tokens in (ids, changed))
            for name in ("last_hidden_state", "logits"):
                found, expected = getattr(after, name), getattr(before, name)
                assert torch.equal(found[~is_later], expected[~is_later]), name
                assert not torch.equal(found[is_later], expected[is_later])


def left_padded(ids: Tensor, num_pads: int) -> dict[str, Tensor]:
    pads = torch.zeros(len(ids), num_pads, dtype=torch.long)
    return {
        "input_ids": torch.cat([pads, ids], dim=1),
        "attention_mask": torch.cat([pads, torch.ones_like(ids)], dim=1),
    }


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_sequence_gives_the_same_alone_in_a_batch_in_another_place_and_padded(dtype: torch.dtype, tolerance: float):
    model = make(dtype=dtype, stopping={"max_steps": 12, "rtol": 1e-3})
    draw = torch.Generator().manual_seed(3)
    ids, order = torch.randint(VOCABULARY, (8, 12), generator=draw), torch.randperm(8, generator=draw)
    with torch.no_grad():
        together, moved, padded = model(ids), model(ids[order]), model(**left_padded(ids, 4))
        alone = [model(ids[i : i + 1]) for i in range(8)]
    found = {
        "in another place": (moved.logits[order.argsort()], moved.solution.num_evaluations[order.argsort()]),
        "padded": (padded.logits[:, 4:], padded.solution.num_evaluations),
        "alone": (
            torch.cat([output.logits for output in alone]),
            torch.cat([output.solution.num_evaluations for output in alone]),
        ),
    }
    for how, (logits, num_evaluations) in found.items():
        torch.testing.assert_close(logits, together.logits, rtol=0, atol=tolerance, msg=how)
        assert torch.equal(num_evaluations, together.solution.num_evaluations), how
    assert len(together.solution.num_evaluations.unique()) > 1


@pytest.mark.parametrize(
    ("dtype", "of_logits", "of_nats"), [(torch.float32, 1e-5, 1e-6), (torch.bfloat16, 2e-2, 1e-3)], ids=str
)
@pytest.mark.parametrize("rule", [StoppingRule.fixed(5), StoppingRule(rtol=1e-2)], ids=["fixed", "tolerance"])
def test_a_prefix_alone_predicts_what_it_does_in_a_longer_text(
    ids: Tensor, rule: StoppingRule, dtype: torch.dtype, of_logits: float, of_nats: float
):
    model = make(dtype=dtype)
    with torch.no_grad():
        whole = model(ids, stopping=rule).logits[:, :-1]
        alone = torch.stack([model(ids[:, :end], stopping=rule).logits[:, -1] for end in range(1, ids.shape[1])], dim=1)
    torch.testing.assert_close(alone, whole, rtol=0, atol=of_logits)
    nats = [-logits.log_softmax(dim=-1).gather(2, ids[:, 1:, None]) for logits in (alone, whole)]
    assert (nats[0] - nats[1]).mean().abs() <= of_nats


def test_the_same_call_gives_the_same_bits_whatever_was_called_between(ids: Tensor):
    model = make(dtype=torch.float32, cell={"dropout": 0.1}, stopping={"max_steps": 12, "rtol": 1e-3})
    with torch.no_grad():
        before = [model(tokens).logits for tokens in (ids, ids.flip(0))]
        model.generate(ids[:, :4], max_new_tokens=3, pad_token_id=0)
        model(ids[:, 3:], memory=model(ids[:1, :7].expand(3, -1)).memory)
    model.train()
    model(ids, labels=ids).loss.backward()
    model.eval()
    with torch.no_grad():
        after = [model(tokens).logits for tokens in (ids.flip(0), ids)]
    assert torch.equal(before[0], after[1])
    assert torch.equal(before[1], after[0])


def test_a_value_that_is_not_finite_spoils_its_sequence_which_says_so_and_no_other(ids: Tensor):
    """NaN comes back through attention: 0 times NaN is NaN, so that no position of the sequence can be trusted."""
    model = make(dtype=torch.float32, stopping={"max_steps": 30, "rtol": 1e-3})
    with torch.no_grad():
        clean = model(ids)
        for value in (float("nan"), float("inf")):

            def spoil(_module, _inputs, output: Tensor, value: float = value) -> Tensor:
                output[1, 7, 0] = value
                return output

            with model.model.embed_tokens.register_forward_hook(spoil):
                spoiled = model(ids)
            assert spoiled.solution.outcome.tolist() == [Outcome.CONVERGED, Outcome.NON_FINITE, Outcome.CONVERGED]
            assert torch.equal(spoiled.logits[[0, 2]], clean.logits[[0, 2]])


@pytest.mark.parametrize("solver", ["broyden", "anderson", "picard"])
@pytest.mark.parametrize("stopping", [StoppingRule.fixed(4), StoppingRule(rtol=1e-2)], ids=["fixed", "tolerance"])
def test_left_padding_changes_nothing_however_far_the_solve_got(ids: Tensor, solver: str, stopping: StoppingRule):
    model = make(solver={"name": solver})
    with torch.no_grad():
        found, expected = model(**left_padded(ids, 4), stopping=stopping), model(ids, stopping=stopping)
    torch.testing.assert_close(found.last_hidden_state[:, 4:], expected.last_hidden_state, rtol=0, atol=1e-10)
    assert torch.equal(found.solution.num_evaluations, expected.solution.num_evaluations)
    assert not found.last_hidden_state[:, :4].any()


def test_left_padding_changes_no_gradient(ids: Tensor):
    model = make()
    gradients = []
    for inputs in (left_padded(ids, 4), {"input_ids": ids}):
        hidden = model(**inputs, stopping=StoppingRule.fixed(4)).last_hidden_state[:, -12:]
        gradients.append(torch.autograd.grad(hidden.square().sum(), list(model.model.parameters())))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * expected.norm().item())


@pytest.mark.parametrize("num_pads", [1, 4])
def test_the_segment_after_a_left_padded_one_does_not_see_the_padding(ids: Tensor, num_pads: int):
    model = make()  # remembers 6 positions
    first, second, third = ids[:, :3], ids[:, 3:5], ids[:, 5:]
    with torch.no_grad():
        found, expected = model(**left_padded(first, num_pads)), model(first)
        for segment in (second, third):
            found, expected = (model(segment, memory=output.memory) for output in (found, expected))
            torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, rtol=0, atol=1e-9)


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


def test_the_evaluation_follows_the_stopping_rule_unless_it_has_its_own(ids: Tensor, tmp_path):
    fixed = {"rtol": 0.0, "patience": None, "divergence_factor": None}
    make(stopping={**fixed, "max_steps": 5}).save_pretrained(tmp_path / "none")
    make(stopping={"max_steps": 5}, evaluation_stopping={**fixed, "max_steps": 7}).save_pretrained(tmp_path / "own")
    for name, expected in (("none", 9), ("own", 7)):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name, stopping={**fixed, "max_steps": 9})
        assert model.train()(ids).solution.num_steps.tolist() == [9] * 3
        assert model.eval()(ids).solution.num_steps.tolist() == [expected] * 3


@pytest.mark.parametrize(
    ("unused", "names"),
    [
        ({"solver": {"name": "picard"}}, "model.solver."),
        ({"stopping": {"max_steps": 5}}, "model.stopping."),
        ({"evaluation_stopping": {"max_steps": 5}}, "model.evaluation_stopping."),
        ({"adjoint": {"name": "phantom"}, "solver": {"name": "anderson"}}, "model.solver, model.adjoint."),
    ],
)
def test_settings_of_a_solve_warn_in_an_unrolled_model(unused: dict, names: str):
    with pytest.warns(UnusedSettingWarning, match=f"depth=unrolled.*: {re.escape(names)}"):
        DEQLMConfig(depth="unrolled", num_layers=3, **unused)


def test_an_unrolled_model_may_state_all_settings_at_their_defaults():
    complete = DEQLMConfig()
    stated = {name: getattr(complete, name) for name in ("solver", "stopping", "evaluation_stopping", "adjoint")}
    assert DEQLMConfig(depth="unrolled", num_layers=3, **stated).solver == complete.solver


@pytest.mark.parametrize("solver", ["broyden", "anderson"])
def test_a_solver_that_cannot_be_unrolled_is_refused_with_the_configuration(solver: str):
    with pytest.raises(
        ConfigError, match=rf"model\.adjoint: unrolled with the solver {solver.capitalize()}, .*Use Picard"
    ):
        DEQLMConfig(solver={"name": solver}, adjoint={"name": "unrolled"})


def test_unrolling_the_picard_iteration_gives_the_gradient_of_its_steps(ids: Tensor):
    fixed = {"max_steps": 3, "rtol": 0.0, "patience": None, "divergence_factor": None}
    model = make(solver={"name": "picard"}, adjoint={"name": "unrolled"}, stopping=fixed)
    gradients = [
        torch.autograd.grad(twin(ids, labels=ids).loss, list(twin.parameters())) for twin in (model, unroll(model, 4))
    ]
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


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
        found, expected = model(ids, num_unrolled_steps=2), unroll(model, 2)(ids)
        assert torch.equal(found.last_hidden_state, expected.last_hidden_state)


def test_another_adjoint_for_one_call_is_the_model_configured_with_it(ids: Tensor):
    model, phantom = make(), make(adjoint={"name": "phantom", "num_steps": 1, "relaxation": 0.5})
    config = model.config.to_dict()
    gradients = []
    for twin, adjoint in ((model, Phantom(num_steps=1, relaxation=0.5)), (phantom, None), (model, None)):
        twin.zero_grad()
        twin(ids[:, :-1], targets=ids[:, 1:], adjoint=adjoint).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in twin.parameters()]))
        assert (twin.adjoint_solution is None) == (len(gradients) < 3)
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.allclose(gradients[0], gradients[2], rtol=1e-3)  # the next call goes by the configuration again
    assert model.config.to_dict() == config


@pytest.mark.parametrize(("adjoint", "words"), [(Unrolled(), "unrolled with the solver"), (Reversed(), "'reversible'")])
def test_another_adjoint_for_one_call_has_to_go_with_the_solver(ids: Tensor, adjoint: Adjoint, words: str):
    with torch.no_grad(), pytest.raises(ValueError, match=words):
        make()(ids, adjoint=adjoint)


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
    with pytest.raises(ValueError, match=r"stopping.*num_unrolled_steps.*not both"):
        model(ids, stopping=StoppingRule(), num_unrolled_steps=2)
    with pytest.raises(ValueError, match=r"adjoint.*num_unrolled_steps.*not both"):
        model(ids, adjoint=Phantom(), num_unrolled_steps=2)
    with pytest.raises(ValueError, match=r"max_evaluations.*num_unrolled_steps.*not both"):
        model(ids, max_evaluations=3, num_unrolled_steps=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_mask": torch.ones(3, 18)}, r"attention_mask of shape \(3, 18\).*\(3, 12\).*memory brings its own"),
        ({"attention_mask": torch.ones(2, 12)}, r"attention_mask of shape \(2, 12\)"),
        ({"memory": Memory(torch.zeros(2, 6, 16), torch.zeros(2, 6, 16))}, "memory of 2 sequences.*memory=None"),
        (
            {"memory": Memory(torch.zeros(3, 6, 8), torch.zeros(3, 6, 8))},
            r"memory.z of shape \(3, 6, 8\).*\(3, 6, 16\)",
        ),
        ({"input_ids": torch.zeros(12, dtype=torch.long)}, r"input_ids of shape \(12,\)"),
        ({"targets": torch.zeros(3, 11, dtype=torch.long)}, r"targets of shape \(3, 11\).*\(3, 12\)"),
        ({"labels": torch.zeros(3, 11, dtype=torch.long)}, r"labels of shape \(3, 11\).*\(3, 12\)"),
    ],
    ids=["mask_length", "mask_batch", "memory_batch", "memory_width", "one_dimension", "targets", "labels"],
)
def test_inputs_of_the_wrong_shape_are_refused_by_name(ids: Tensor, change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        make()(**{"input_ids": ids, **change})
