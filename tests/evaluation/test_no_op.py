"""The no-op check tells a model that uses its depth from one that does not."""

from __future__ import annotations

import pytest
import torch

from deq_lm.evaluation import EvaluationConfig, evaluate_perplexity
from deq_lm.evaluation.no_op import check_no_op

CONFIG = EvaluationConfig(batch_size=3, segment_length=8, no_op_segments=2)


def test_a_solve_that_is_one_evaluation_goes_no_distance(deq_model, make_split, fixed_steps):
    check = check_no_op(deq_model(stopping=fixed_steps(0)), make_split(100).tokens, CONFIG)
    assert check.distance == 0.0
    assert check.nats_per_token == check.first_nats_per_token


def test_distance_and_both_losses_are_those_of_the_segments_checked(deq_model, make_split):
    model = deq_model(cell={"mem_len": 0})
    split = make_split(3 * 8)
    tokens = torch.from_numpy(split.tokens.astype("int64"))
    with torch.no_grad():
        ids, targets = tokens[:-1].view(3, 8), tokens[1:].view(3, 8)
        end = model(ids, targets=targets)
        start = model(ids, targets=targets, num_unrolled_steps=1)
    distance = (end.last_hidden_state - start.last_hidden_state).norm() / end.last_hidden_state.norm()
    check = check_no_op(model, split.tokens, CONFIG)
    assert check.num_tokens == 24
    assert check.distance == pytest.approx(distance.item(), rel=1e-9)
    assert check.distance > 0.1
    assert check.nats_per_token == pytest.approx(end.loss.item(), rel=1e-9)
    assert check.first_nats_per_token == pytest.approx(start.loss.item(), rel=1e-9)


def test_the_solved_loss_is_that_of_a_bounded_evaluation_with_memory(deq_model, make_split):
    model, split = deq_model(), make_split(100)
    bounded = EvaluationConfig(batch_size=3, segment_length=8, max_segments=2)
    expected = evaluate_perplexity(model, split, bounded).perplexity
    check = check_no_op(model, split.tokens, CONFIG)
    assert check.num_tokens == expected.num_tokens
    assert check.nats_per_token == pytest.approx(expected.nats_per_token, rel=1e-12)
