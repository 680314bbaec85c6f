"""The causality audit finds leaks, and only leaks."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from deq_lm.errors import DataError
from deq_lm.evaluation import EvaluationConfig, audit_causality, causality
from deq_lm.evaluation.causality import MAX_SEQUENCES

CONFIG = EvaluationConfig(batch_size=2, segment_length=12, causality_cuts=5 * MAX_SEQUENCES + 1)


def leaking(model, size: float):
    """`model`, whose logits at every position grow by `size` where the last token of the segment is even."""
    honest = model.logits_of

    def logits_of(input_ids):
        logits = honest(input_ids)
        logits[..., 0] += size * (input_ids[:, -1:] % 2 == 0)
        return logits

    model.logits_of = logits_of
    return model


def test_an_honest_model_changes_by_exactly_nothing(table_model, make_split):
    audit = audit_causality(table_model(), make_split(100).tokens, CONFIG)
    assert audit.max_change_nats == audit.mean_change_nats == 0.0
    assert audit.mean_bias_nats == 0.0
    assert audit.num_cuts == 6 * MAX_SEQUENCES
    assert audit.is_causal


@pytest.mark.parametrize(("at_a_time", "num_cuts"), [(100, 48), (3, 42), (1, 41)])
def test_no_fewer_cuts_are_made_where_a_large_vocabulary_lets_few_sequences_be_tried_at_a_time(
    table_model, make_split, monkeypatch, at_a_time, num_cuts
):
    monkeypatch.setattr(causality, "MAX_LOGITS", at_a_time * CONFIG.segment_length * 23)
    assert audit_causality(table_model(), make_split(100).tokens, CONFIG).num_cuts == num_cuts


@pytest.mark.parametrize(("size", "is_causal"), [(1e-4, True), (1e-2, False), (3.0, False)])
def test_a_planted_leak_is_reported_with_its_size(table_model, make_split, size, is_causal):
    audit = audit_causality(leaking(table_model(torch.zeros(23, 23)), size), make_split(100).tokens, CONFIG)
    # among log-probabilities of 23 equal logits, the raised one moves by size - log(1 + (e^size - 1) / 23)
    assert audit.max_change_nats == pytest.approx(size - math.log1p(math.expm1(size) / 23), rel=1e-6)
    assert 0 < audit.mean_change_nats < audit.max_change_nats
    assert audit.is_causal is is_causal


def test_a_model_that_has_seen_what_it_predicts_has_a_negative_bias(table_model, make_split):
    model = table_model(torch.zeros(23, 23))

    def logits_of(input_ids):
        logits = model.table[input_ids]
        ahead = input_ids.roll(-1, dims=1)
        ahead[:, -1] = input_ids[:, -1]
        return logits + 2 * torch.nn.functional.one_hot(ahead, 23)

    model.logits_of = logits_of
    audit = audit_causality(model, make_split(100).tokens, CONFIG)
    assert audit.mean_bias_nats < -1
    assert audit.mean_bias_nats + 4 * audit.bias_standard_error_nats < 0
    assert not audit.is_causal


@pytest.mark.parametrize("solver", ["broyden", "anderson"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_steps", [3, 12])
def test_the_prefix_scope_is_exactly_causal_at_any_step_count(
    deq_model, make_split, fixed_steps, solver, dtype, num_steps
):
    model = deq_model(dtype=dtype, solver={"name": solver}, stopping=fixed_steps(num_steps))
    audit = audit_causality(model, make_split(100).tokens, CONFIG)
    assert audit.max_change_nats == 0.0
    assert abs(audit.mean_bias_nats) < 1e-5


@pytest.mark.parametrize("solver", ["broyden", "anderson"])
def test_the_sequence_scope_stopped_early_is_not_causal(deq_model, make_split, fixed_steps, solver):
    model = deq_model(solver={"name": solver, "scope": "sequence"}, stopping=fixed_steps(5))
    audit = audit_causality(model, make_split(100).tokens, CONFIG)
    assert audit.max_change_nats > 1e-3
    assert not audit.is_causal


def passes(model) -> list[tuple[torch.Tensor, object]]:
    """A list that fills with tokens and memory of every forward pass of `model`."""
    seen = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0], kwargs.get("memory"))), with_kwargs=True
    )
    return seen


def test_each_sequence_is_changed_after_a_cut_of_its_own(deq_model, make_split):
    model = deq_model()
    seen = passes(model)
    audit_causality(model, make_split(100).tokens, CONFIG)
    text, other, prefix = (ids for ids, _ in seen[:3])
    is_changed = text != other
    cuts = is_changed.int().argmax(dim=1)
    assert torch.equal(is_changed, torch.arange(12) >= cuts[:, None])  # all after it, nothing before it
    assert (cuts >= 1).all()
    assert len(set(cuts.tolist())) > 2
    assert torch.equal(prefix, text[:, : cuts[0]])


@pytest.mark.parametrize("num_cuts", [1, 2, 8, 5 * MAX_SEQUENCES + 1])
def test_every_second_batch_has_memory_and_the_same_memory_for_both_texts(deq_model, make_split, num_cuts):
    model = deq_model()
    seen = passes(model)
    audit = audit_causality(model, make_split(100).tokens, replace(CONFIG, causality_cuts=num_cuts))
    assert max(num_cuts, 2) <= audit.num_cuts < num_cuts + MAX_SEQUENCES
    first, (before, *tried) = seen[:3], seen[3:7]
    assert all(memory is None for _, memory in first)
    assert before[1] is None
    assert tried[0][1] is not None
    assert all(memory is tried[0][1] for _, memory in tried)


def test_the_audit_repeats_for_a_seed_and_leaves_the_random_state_alone(table_model, make_split):
    model, tokens = leaking(table_model(), 1.0), make_split(100).tokens
    before = torch.get_rng_state()
    found = [audit_causality(model, tokens, CONFIG, seed=seed) for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_that_is_not_finite_does_not_pass(table_model, make_split):
    audit = audit_causality(table_model(torch.full((23, 23), math.nan)), make_split(100).tokens, CONFIG)
    assert audit.max_change_nats is None
    assert not audit.is_causal


def test_a_split_shorter_than_two_segments_is_audited_on_what_there_is(table_model, make_split):
    assert audit_causality(table_model(), make_split(13).tokens, CONFIG).is_causal
    assert audit_causality(table_model(), make_split(4).tokens, CONFIG).is_causal
    with pytest.raises(DataError, match="has 3 tokens"):
        audit_causality(table_model(), make_split(3).tokens, CONFIG)
