"""Metrics: what is summed, what is averaged, and what a person reads."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from deq_lm.solvers import Broyden, StoppingRule, solve
from deq_lm.solvers.stopping import Outcome
from deq_lm.training.faults import Account
from deq_lm.training.run_folder import RunFolder
from deq_lm.training.step import facts_of
from deq_lm.training.tracking import Interval, Tracker, memory_use, readable, summarize


def test_losses_are_summed_and_divided_once_and_solves_are_pooled_over_processes():
    sums = {"num_steps": 2, "num_targets": 30, "nll_nats": 60.0, "seconds": 1.5}
    first = Interval(
        **sums,
        solver_evaluations=[4.0, 6.0],
        solver_residuals=[1e-3, 1e-2],
        solver_outcomes=[0, 0],
        solver_fallbacks=[0.0, 0.0],
        adjoint_evaluations=[8.0],
        adjoint_residuals=[0.1],
        adjoint_outcomes=[0],
        adjoint_fallbacks=[1.0],
    )
    second = Interval(
        **sums,
        solver_evaluations=[5.0, 9.0],
        solver_residuals=[1e-1, 1e-2],
        solver_outcomes=[1, 0],
        solver_fallbacks=[0.0, 1.0],
        adjoint_evaluations=[10.0],
        adjoint_residuals=[0.3],
        adjoint_outcomes=[2],
        adjoint_fallbacks=[1.0],
    )
    metrics = summarize([first, second])
    assert metrics["loss"] == 2.0
    assert metrics["token_perplexity"] == pytest.approx(math.exp(2))
    assert metrics["tokens_per_second"] == 20.0
    assert metrics["solver_evaluations"] == 6.0
    assert metrics["solver_residual"] == 1e-2
    assert metrics["adjoint_evaluations"] == 9.0
    assert metrics["adjoint_residual"] == pytest.approx(0.2)
    assert (metrics["solver_evaluations_max"], metrics["adjoint_evaluations_max"]) == (9, 10)
    assert (metrics["solver_residual_max"], metrics["adjoint_residual_max"]) == (0.1, 0.3)
    assert (metrics["solver_share_converged"], metrics["adjoint_share_converged"]) == (0.75, 0.5)
    assert (metrics["solver_share_fallback"], metrics["adjoint_share_fallback"]) == (0.25, 1.0)


def test_an_interval_without_a_step_that_counted_has_no_loss():
    account = Account(num_steps={"not_finite": 1}, num_skipped=1)
    metrics = summarize([Interval(num_steps=1, account=account)])
    none = dict.fromkeys(("loss_spike", "unconverged_solve", "unconverged_adjoint", "retried"), 0)
    assert metrics == {**dict.fromkeys(metrics), **none, "not_finite": 1, "skipped": 1}
    assert readable(metrics) == "1 not finite  1 without update"


def test_solves_that_failed_count_as_the_worst_and_never_reach_the_json():
    failed = [math.nan, math.inf]
    assert summarize([Interval(solver_residuals=[*failed, 0.1, 0.2, 0.3])])["solver_residual"] == 0.3
    assert summarize([Interval(solver_residuals=[*failed, 0.1])])["solver_residual"] is None
    assert summarize([Interval(adjoint_residuals=[0.1, math.nan])])["adjoint_residual_max"] is None
    assert summarize([Interval(num_targets=1, nll_nats=1e4, num_steps=1)])["token_perplexity"] == math.exp(700)


@pytest.mark.parametrize("name", ["solver", "adjoint"])
def test_the_line_to_read_has_a_word_only_for_solves_that_did_not_go_as_they_should(name):
    usual = Interval(**{f"{name}_outcomes": [Outcome.CONVERGED] * 8, f"{name}_fallbacks": [0.0] * 8})
    assert readable(summarize([usual])) == ""
    outcomes = [Outcome.CONVERGED] * 5 + [Outcome.DIVERGED, Outcome.NON_FINITE, Outcome.STALLED]
    unusual = Interval(**{f"{name}_outcomes": outcomes, f"{name}_fallbacks": [1.0] * 2 + [0.0] * 6})
    assert readable(summarize([unusual])) == "62.5% converged  25.0% diverged  25.0% by fallback"
    assert summarize([unusual])[f"{name}_share_stalled"] == 0.125
    assert readable(summarize([Interval(account=Account(num_retried=2, num_skipped=1))])) == (
        "2 computed again  1 without update"
    )


def test_every_metric_of_a_training_line_is_documented():
    lines = (Path(__file__).resolve().parents[2] / "recipes" / "README.md").read_text("utf-8").splitlines()
    rows = lines[lines.index("| `train` | is |") + 2 :]
    documented = []
    for row in rows[: rows.index("")]:
        documented += re.findall(r"`(\w+)`", row.split("|")[1])
    assert documented == [*summarize([Interval()]), "lr", "grad_norm", *memory_use(torch.device("cpu"))]


def test_a_solve_that_fell_back_and_one_that_diverged_are_told_apart():
    def f(z):  # contracts the first sequence; throws the second far out, where coefficients made of differences fail
        return torch.stack([0.1 * z[0] + 1, z[1] ** 3 + 5])

    solution = solve(f, torch.ones(2, 4, 3), solver=Broyden(), stopping=StoppingRule(max_steps=8, rtol=1e-4))
    facts = {name: values.tolist() for name, values in facts_of(solution, unrolled=False).items()}
    assert facts["outcomes"] == [Outcome.CONVERGED, Outcome.DIVERGED]
    assert facts["fallbacks"] == [False, True]
    assert facts["residuals"] == solution.relative_residual.tolist()
    assert facts["evaluations"] == solution.num_evaluations.tolist()


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


def test_memory_is_what_the_operating_system_has_counted_for_this_process():
    before = memory_use(torch.device("cpu"))
    assert before["device_peak_bytes"] is None
    held = torch.ones(before["process_peak_bytes"] // 4)  # as much again, in float32
    assert memory_use(torch.device("cpu"))["process_peak_bytes"] >= held.nbytes


def test_text_of_the_model_goes_to_the_log_to_tensorboard_and_without_its_controls_to_the_terminal(tmp_path, capsys):
    run, text = RunFolder(tmp_path), "red\x1b[31m\n# no title"
    with Tracker(run, step=0, max_steps=4, tensorboard=True, enabled=True) as tracker:
        tracker.show_text(2, "sample", text)
    assert capsys.readouterr().out == "step 2/4  sample: red\\x1b[31m | # no title\n"
    assert json.loads(run.metrics.read_text()) == {"step": 2, "kind": "sample", "text": text}
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (event,) = events.Tensors("sample/text_summary")
    assert event.tensor_proto.string_val == [b"    red\\x1b[31m\n    # no title\n"]
