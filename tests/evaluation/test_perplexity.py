"""Perplexity: every target once, summed in nats, divided once."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from processes import launch

from deq_lm import DEQLMConfig, DEQLMForCausalLM
from deq_lm.data import streams
from deq_lm.data.encoding import EncodedSplit
from deq_lm.errors import ConfigError
from deq_lm.evaluation import EvaluationConfig, Perplexity, evaluate_perplexity, token_loss
from deq_lm.evaluation.token_loss import score_tokens


def test_a_uniform_model_scores_ln_v_per_token(table_model, make_split, config):
    result = evaluate_perplexity(table_model(torch.zeros(23, 23)), make_split(101), config)
    assert result.perplexity.num_tokens == 101
    assert result.perplexity.nats_per_token == pytest.approx(math.log(23), rel=1e-12)
    assert result.perplexity.token_perplexity == pytest.approx(23, rel=1e-12)


def test_each_quotient_has_its_own_denominator():
    perplexity = Perplexity(nll_nats=600.0, num_tokens=200, num_words=100, num_bytes=400)
    assert perplexity.nats_per_token == 3.0
    assert perplexity.token_perplexity == pytest.approx(math.exp(3))
    assert perplexity.nats_per_word == 6.0
    assert perplexity.word_perplexity == pytest.approx(math.exp(6))
    assert perplexity.bits_per_byte == pytest.approx(1.5 / math.log(2))


def test_what_is_not_finite_or_not_known_is_none():
    broken = Perplexity(nll_nats=None, num_tokens=2, num_words=1, num_bytes=5)
    assert (broken.token_perplexity, broken.nats_per_word, broken.bits_per_byte) == (None, None, None)
    partial = Perplexity(nll_nats=2.0, num_tokens=2, num_words=None, num_bytes=None)
    assert (partial.nats_per_token, partial.word_perplexity, partial.bits_per_byte) == (1.0, None, None)
    hopeless = Perplexity(nll_nats=800.0, num_tokens=100, num_words=1, num_bytes=5)
    assert (hopeless.nats_per_word, hopeless.word_perplexity) == (800.0, None)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 16])
@pytest.mark.parametrize("num_tokens", [24, 101])
def test_a_model_without_memory_scores_the_same_however_the_text_is_cut(
    table_model, make_split, batch_size, num_tokens
):
    model, split = table_model(), make_split(num_tokens)
    config = EvaluationConfig(batch_size=batch_size, segment_length=7)
    tokens = torch.from_numpy(split.tokens.astype(np.int64))
    nll = -model.table.log_softmax(-1)[tokens[:-1], tokens[1:]].sum().item()
    assert evaluate_perplexity(model, split, config).perplexity.nll_nats == pytest.approx(nll, rel=1e-12)


@pytest.mark.parametrize(("mem_len", "segment_length"), [(0, 8), (6, 8), (12, 5)])
def test_the_real_model_scores_what_twenty_lines_of_its_own_find(deq_model, make_split, mem_len, segment_length):
    model, split = deq_model(cell={"mem_len": mem_len}), make_split(61)
    tokens = torch.from_numpy(split.tokens.astype(np.int64))
    nll, memory, evaluations = 0.0, None, []
    with torch.no_grad():
        for start in range(0, 61, segment_length):
            stretch = tokens[None, start : start + segment_length + 1]
            output = model(stretch[:, :-1], memory=memory)
            probabilities = output.logits.double().softmax(-1)[0]
            nll -= sum(math.log(row[target]) for row, target in zip(probabilities, stretch[0, 1:], strict=True))
            memory = output.memory
            evaluations.append(output.solution.num_evaluations.item())
    result = evaluate_perplexity(model, split, EvaluationConfig(batch_size=1, segment_length=segment_length))
    assert result.perplexity.nll_nats == pytest.approx(nll, rel=1e-6)  # logits are float32
    assert result.solves.num_solves == len(evaluations)
    assert result.solves.max_evaluations == max(evaluations)
    assert result.solves.mean_evaluations == pytest.approx(np.mean(evaluations))


def charging_model(table_model, num_tokens):
    """Charges 2^t nats for target t of a text that counts up, so that the sum shows which targets were scored."""
    model = table_model(torch.zeros(num_tokens + 1, num_tokens + 1))
    forward = model.forward

    def charged(input_ids, *, targets, **_):
        output = forward(input_ids, targets=targets)
        output.target_nats = torch.where(targets == -100, 0.0, 2.0 ** targets.double())
        return output

    model.forward = charged
    tokens = np.arange(num_tokens + 1).astype(np.uint16)
    return model, EncodedSplit(tokens=tokens, num_words=num_tokens, num_bytes=num_tokens)


@pytest.mark.parametrize("num_tokens", [24, 40, 47])
def test_every_target_is_scored_once(table_model, num_tokens, config):
    model, split = charging_model(table_model, num_tokens)
    assert evaluate_perplexity(model, split, config).perplexity.nll_nats == 2 ** (num_tokens + 1) - 2


def test_a_dropped_tail_is_noticed(table_model, monkeypatch, config):
    model, split = charging_model(table_model, 40)

    class Dropping(streams.ContiguousStreams):
        def __iter__(self):
            return iter(list(super().__iter__())[:-1])

    monkeypatch.setattr(token_loss, "ContiguousStreams", Dropping)
    with pytest.raises(AssertionError, match="of 40 tokens"):
        evaluate_perplexity(model, split, config)


def test_a_target_counted_twice_shows_in_the_nats_even_if_another_is_left_out(table_model, monkeypatch, config):
    model, split = charging_model(table_model, 40)

    class Doubling(streams.ContiguousStreams):
        def __iter__(self):
            for segment in super().__iter__():
                yield dataclasses.replace(segment, targets=segment.targets.clamp(max=39))

    monkeypatch.setattr(token_loss, "ContiguousStreams", Doubling)
    assert evaluate_perplexity(model, split, config).perplexity.nll_nats != 2**41 - 2


def test_a_bounded_validation_scores_the_first_segments_of_every_stream_and_knows_no_words(table_model, make_split):
    config = EvaluationConfig(batch_size=3, segment_length=8, max_segments=2)
    perplexity = evaluate_perplexity(table_model(), make_split(101), config).perplexity
    assert perplexity.num_tokens == 3 * 8 * 2
    assert perplexity.num_words is perplexity.num_bytes is perplexity.word_perplexity is None
    assert perplexity.token_perplexity is not None
    whole = evaluate_perplexity(table_model(), make_split(40), config).perplexity
    assert (whole.num_tokens, whole.num_words) == (40, 20)


def test_evaluation_leaves_the_model_as_it_was(deq_model, make_split, config):
    model, split = deq_model(cell={"dropout": 0.5}), make_split(60)
    before = torch.get_rng_state()
    in_evaluation_mode = evaluate_perplexity(model, split, config)
    model.train()
    model.lm_head.eval()
    assert evaluate_perplexity(model, split, config) == in_evaluation_mode  # no dropout
    assert model.training
    assert not model.lm_head.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), before)


def test_memory_reaches_from_one_segment_into_the_next(deq_model, make_split, config):
    losses = [score_tokens(deq_model(cell={"mem_len": m}), make_split(60).tokens, config).nll_nats for m in (0, 6)]
    assert abs(losses[0] - losses[1]) > 1e-3


def test_statistics_count_solves_and_leave_out_streams_that_have_ended(deq_model, make_split, fixed_steps):
    model = deq_model(stopping=fixed_steps(4))
    config = EvaluationConfig(batch_size=4, segment_length=4)
    lengths = []
    model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    solves = score_tokens(model, make_split(4 * 4 + 2).tokens, config).solves  # two streams have a fifth target
    assert lengths == [4, 1]  # nothing is solved where every stream has ended
    assert solves.outcomes == {"max_steps": 4 + 2}
    assert solves.share_converged == 0.0
    assert (solves.mean_evaluations, solves.max_evaluations) == (5.0, 5)
    assert 0 < solves.median_residual <= solves.residual_95 <= solves.max_residual


def test_a_solve_that_failed_is_the_worst_residual(table_model, make_split, config):
    model = table_model()
    forward = model.forward

    def failing(input_ids, **arguments):
        output = forward(input_ids, **arguments)
        facts = output.solution
        output.solution = SimpleNamespace(
            outcome=torch.tensor([0, 0, 4]),
            num_evaluations=facts.num_evaluations,
            relative_residual=torch.tensor([1e-4, 1e-3, math.nan]),
        )
        return output

    model.forward = failing
    result = evaluate_perplexity(model, make_split(60), config)
    assert result.solves.outcomes == {"converged": 6, "non_finite": 3}
    assert result.solves.share_converged == pytest.approx(2 / 3)
    assert result.solves.median_residual == pytest.approx(1e-3)
    assert result.solves.max_residual is None
    assert result.metrics()["solver_residual_max"] is None


def test_a_broken_model_has_no_perplexity_and_its_metrics_are_json(table_model, make_split, config):
    metrics = evaluate_perplexity(table_model(torch.full((23, 23), math.nan)), make_split(60), config).metrics()
    assert metrics["nats_per_token"] is metrics["token_perplexity"] is metrics["bits_per_byte"] is None
    assert metrics["num_tokens"] == 60


def test_mixed_precision_is_left_during_evaluation_and_there_again_afterwards(
    deq_model, make_split, config, monkeypatch
):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    expected = evaluate_perplexity(deq_model(dtype=torch.float32), make_split(60), config)
    try:
        model = Accelerator(mixed_precision="bf16").prepare(deq_model(dtype=torch.float32))
        assert evaluate_perplexity(model, make_split(60), config) == expected
        ids = torch.arange(8)[None]
        with torch.no_grad():
            mixed = model(ids).logits
            assert (mixed - deq_model(dtype=torch.float32)(ids).logits).abs().max() > 1e-4
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert evaluate_perplexity(deq_model(dtype=torch.float32), make_split(60), config) == expected


def test_two_processes_find_what_one_does(table_model, make_split, monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    model, split = table_model(), make_split(101)
    config = EvaluationConfig(batch_size=4, segment_length=7)
    expected = evaluate_perplexity(model, split, config)

    def compare():
        accelerator = Accelerator()
        found = evaluate_perplexity(model, split, config, accelerator)
        assert found.perplexity.nll_nats == pytest.approx(expected.perplexity.nll_nats, rel=1e-12)
        assert dataclasses.replace(found.perplexity, nll_nats=0.0) == dataclasses.replace(
            expected.perplexity, nll_nats=0.0
        )
        assert found.solves == expected.solves
        odd = EvaluationConfig(batch_size=3, segment_length=7)
        with pytest.raises(ConfigError):
            evaluate_perplexity(model, split, odd, accelerator)
        (tmp_path / str(accelerator.process_index)).touch()

    launch(compare)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"segment_length": 1}, "segment_length=1"),
        ({"max_segments": 0}, "max_segments=0.*null"),
        ({"causality_cuts": 0}, "causality_cuts=0"),
        ({"no_op_segments": -1}, "no_op_segments=-1"),
        ({"unroll_depths": (4, 0)}, "unroll_depths"),
        ({"sample_tokens": -1}, "sample_tokens=-1"),
        ({"sample_temperature": 0.0}, "sample_temperature=0.0"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        EvaluationConfig(**{"batch_size": 4, "segment_length": 8, **settings})


def test_another_memory_length_is_that_of_a_model_trained_with_it():
    tokens = torch.randint(0, 31, (200,), generator=torch.Generator().manual_seed(3)).numpy()
    losses = {}
    for own, asked in ((4, None), (4, 9), (9, None), (9, 4), (4, 0), (0, None)):
        torch.manual_seed(0)
        cell = {"name": "transformer_xl", "d_model": 16, "num_heads": 2, "d_inner": 24, "mem_len": own, "init_std": 0.3}
        model = DEQLMForCausalLM(DEQLMConfig(vocab_size=31, cell=cell))
        split = EncodedSplit(tokens, num_words=50, num_bytes=200)
        config = EvaluationConfig(batch_size=2, segment_length=5, mem_len=asked)
        losses[own, asked] = evaluate_perplexity(model, split, config).perplexity.nll_nats
        assert model.model.layers.cell.mem_len == own
    assert losses[4, 9] == losses[9, None] != losses[4, None] == losses[9, 4]
    assert losses[4, 0] == losses[0, None] != losses[4, None]
