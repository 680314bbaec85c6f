"""The loss at a budget is that of the network unrolled as deep, and tends to that of the solve."""

from __future__ import annotations

import pytest
import torch

from deq_lm import DEQLMConfig, DEQLMForCausalLM
from deq_lm.evaluation import EvaluationConfig
from deq_lm.evaluation.compute_curve import compute_curve
from deq_lm.evaluation.token_loss import score_tokens

CELL = {
    "name": "transformer_xl",
    "d_model": 16,
    "num_heads": 2,
    "d_inner": 24,
    "mem_len": 4,
    "injection": "residual",
    "init_std": 0.3,
}


def make(**settings) -> DEQLMForCausalLM:
    torch.manual_seed(0)
    model = DEQLMForCausalLM(DEQLMConfig(vocab_size=31, cell=CELL, **settings)).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter *= 0.3 if name.endswith("output_norm.weight") else 1.0  # a contraction
    return model


TOKENS = torch.randint(0, 31, (121,), generator=torch.Generator().manual_seed(1)).numpy()
CONFIG = EvaluationConfig(batch_size=2, segment_length=6, curve_evaluations=(1, 2, 5, 40), max_segments=3)


def test_each_budget_is_taken_whole():
    curve = compute_curve(make(solver={"name": "picard"}), TOKENS, CONFIG)
    assert [point.num_evaluations for point in curve] == [1, 2, 5, 40]
    assert {point.num_tokens for point in curve} == {2 * 6 * 3}
    for point in curve:
        unrolled = score_tokens(make(depth="unrolled", num_layers=point.num_evaluations), TOKENS, CONFIG)
        assert point.nats_per_token == pytest.approx(unrolled.nll_nats / unrolled.num_targets, abs=1e-12)


def test_the_curve_ends_at_the_solve():
    solved = score_tokens(make(stopping={"max_steps": 200, "rtol": 1e-10}), TOKENS, CONFIG)
    assert solved.solves is not None
    assert solved.solves.share_converged == 1
    wanted = solved.nll_nats / solved.num_targets
    distances = [abs((point.nats_per_token or 0) - wanted) for point in compute_curve(make(), TOKENS, CONFIG)]
    assert distances[-1] < 1e-6 < 1e-3 < distances[0]


def test_without_budgets_there_is_no_curve():
    config = EvaluationConfig(batch_size=2, segment_length=6)
    assert compute_curve(make(), torch.arange(30).numpy(), config) == []
