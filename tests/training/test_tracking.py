"""Metrics: what is summed, what is averaged, and what a person reads."""

import json
import math

import pytest

from deq_lm.training.run_folder import RunFolder
from deq_lm.training.tracking import Interval, Tracker, readable, summarize


def test_losses_are_summed_and_divided_once_and_solves_are_pooled_over_processes():
    first = Interval(2, 30, 60.0, 1.5, 0, [4.0, 6.0], [1e-3, 1e-2], [8.0], [0.1])
    second = Interval(2, 30, 60.0, 1.5, 0, [5.0, 9.0], [1e-1, 1e-2], [10.0], [0.3])
    metrics = summarize([first, second])
    assert metrics["loss"] == 2.0
    assert metrics["token_perplexity"] == pytest.approx(math.exp(2))
    assert metrics["tokens_per_second"] == 20.0
    assert metrics["solver_evaluations"] == 6.0
    assert metrics["solver_residual"] == 1e-2
    assert metrics["adjoint_evaluations"] == 9.0
    assert metrics["adjoint_residual"] == pytest.approx(0.2)


def test_an_interval_without_a_step_that_counted_has_no_loss():
    metrics = summarize([Interval(num_steps=1, num_skipped=1)])
    assert metrics == {**dict.fromkeys(metrics), "skipped": 1}
    assert readable(metrics) == "1 skipped (not finite)"


def test_solves_that_failed_count_as_the_worst_and_never_reach_the_json():
    failed = [math.nan, math.inf]
    assert summarize([Interval(solver_residuals=[*failed, 0.1, 0.2, 0.3])])["solver_residual"] == 0.3
    assert summarize([Interval(solver_residuals=[*failed, 0.1])])["solver_residual"] is None
    assert summarize([Interval(num_targets=1, nll_nats=1e4, num_steps=1)])["token_perplexity"] == math.exp(700)


def test_a_tracker_writes_a_line_to_read_and_one_to_parse(tmp_path, capsys):
    run = RunFolder(tmp_path)
    with Tracker(run, step=10, max_steps=40, tensorboard=False, enabled=True) as tracker:
        tracker.log(20, "train", {"loss": 2.0, "token_perplexity": 7.4, "grad_norm": None})
        tracker.log(20, "valid", {"nats_per_token": 2.5, "word_perplexity": 1234.5})
    train, valid = capsys.readouterr().out.splitlines()
    assert train.startswith("step 20/40  loss 2.000 nats/token  perplexity 7.4/token  eta 00:")
    assert valid == "step 20/40  valid: loss 2.500 nats/token  1234.5/word"
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert lines[0] == {"step": 20, "kind": "train", "loss": 2.0, "token_perplexity": 7.4, "grad_norm": None}
    assert lines[1]["kind"] == "valid"


def test_only_the_main_process_speaks(tmp_path, capsys):
    with Tracker(RunFolder(tmp_path), step=0, max_steps=4, tensorboard=True, enabled=False) as tracker:
        tracker.advance()
        tracker.log(1, "train", {"loss": 2.0})
        tracker.say("hello")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""
