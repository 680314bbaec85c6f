"""Numerical faults of a training step: found, counted, recorded with their place, and what the recipe says about them."""

import math
import warnings
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import PLAIN, forward_changed, leave_weights_alone, make_recipe, make_state, metrics, not_finite, one_step

from deq_lm.errors import SolveError, UnusedSettingWarning
from deq_lm.training import loop, step
from deq_lm.training.checkpoint import damage
from deq_lm.training.faults import (
    FAULTS,
    MAX_SKIPPED_IN_A_ROW,
    Account,
    FaultConfig,
    FaultsConfig,
    describe_account,
    find_faults,
    give_up,
    sternest_policy,
    worst_solve,
)
from deq_lm.training.loop import train
from deq_lm.training.tracking import summarize

TINY_ADJOINT = (
    "model.adjoint={name: implicit, stopping: {max_steps: 1, rtol: 1.0e-4}}",
    "training.faults.unconverged_adjoint.limit=0.1",
    "training.phases=[]",
    "training.jacobian=null",
    "training.schedule.warmup_steps=0",  # the first step has a rate
)
TINY_SOLVE = (
    "model.stopping={max_steps: 1, rtol: 1.0e-4}",
    "training.faults.unconverged_solve.limit=0.02",
    "training.faults.unconverged_adjoint={policy: ignore, limit: 10.0}",
    *TINY_ADJOINT[2:],
)


ENOUGH_IF_DOUBLED = {
    "unconverged_solve": (
        "model.stopping.max_steps=3",
        "training.faults.unconverged_solve.limit=0.1",
    ),  # 0.19, then 0.08
    "unconverged_adjoint": (  # 0.13, then 0.02
        "model.cell.init_std=0.2",
        "model.stopping={max_steps: 60, rtol: 0.1}",
        "model.adjoint.stopping.max_steps=4",
    ),
}


def policy(name: str, fault: str = "unconverged_adjoint") -> str:
    return f"training.faults.{fault}.policy={name}"


def copy_of_weights(state):
    return [parameter.detach().clone() for parameter in state.model.parameters()]


def same(weights, others) -> bool:
    return all(a.equal(b) for a, b in zip(weights, others, strict=True))


def config(**policies: str) -> FaultsConfig:
    """Of each fault its policy, `warn` if nothing is said; all limits are 1."""
    found = {name: policies.get(name, "warn") for name in FAULTS}
    return FaultsConfig(
        not_finite=policies.get("not_finite", "skip"),
        **{name: FaultConfig(found[name], 1.0) for name in FAULTS if name != "not_finite"},
    )


numbers = st.floats(0, 4) | st.just(math.inf)


@given(finite=st.booleans(), nats=st.floats(0, 9), mean=st.none() | st.floats(0, 9), solver=numbers, adjoint=numbers)
def test_a_fault_is_a_number_above_its_limit_and_nothing_else_is(finite, nats, mean, solver, adjoint):
    found = find_faults(
        config(),
        finite=finite,
        nats_per_token=nats,
        mean_nats_per_token=mean,
        solver_residual=solver,
        adjoint_residual=adjoint,
    )
    if not finite:
        assert found == {"not_finite": None}
        return
    assert ("loss_spike" in found) == (mean is not None and nats - mean > 1)
    assert ("unconverged_solve" in found) == (solver > 1)
    assert ("unconverged_adjoint" in found) == (adjoint > 1)
    assert all(value is None or value > 1 for value in found.values())


@pytest.mark.parametrize(
    ("policies", "first", "second"),
    [
        ({}, "warn", "warn"),
        ({"loss_spike": "ignore", "unconverged_solve": "ignore"}, "ignore", "ignore"),
        ({"loss_spike": "skip"}, "skip", "skip"),
        ({"loss_spike": "retry", "unconverged_solve": "skip"}, "retry", "skip"),
        ({"loss_spike": "raise", "unconverged_solve": "retry"}, "raise", "raise"),
    ],
)
def test_the_sternest_policy_counts_and_a_step_is_computed_again_once(policies, first, second):
    faults = {"loss_spike": 2.0, "unconverged_solve": 3.0}
    assert sternest_policy(config(**policies), faults, may_retry=True) == first
    assert sternest_policy(config(**policies), faults, may_retry=False) == second
    assert sternest_policy(config(**policies), {}, may_retry=True) == "ignore"


def test_the_worst_solve_is_named_by_its_segment_and_stream():
    solves = {"solver_residuals": [0.1, 0.2, 0.3, 0.1], "adjoint_residuals": [0.2, 0.1, 0.2, 0.5]}
    assert worst_solve(solves, rank=3, num_streams=2).to_mapping() == {"residual": 0.5, "segment": 1, "stream": 7}
    solves["solver_residuals"][2] = math.nan
    assert worst_solve(solves, rank=0, num_streams=2).to_mapping() == {"residual": None, "segment": 1, "stream": 0}
    assert worst_solve({}, rank=0, num_streams=2).to_mapping() is None


def test_the_account_says_how_often_each_fault_happened():
    account = Account()
    assert describe_account(account, 1200) == "faults in 1,200 steps: none"
    account.count({"unconverged_solve": 1.0, "loss_spike": 4.0}, updated=False)
    account.count({"unconverged_solve": 1.0}, updated=True)
    account.num_retried += 3
    assert describe_account(account, 1200) == (
        "faults in 1,200 steps: loss_spike 1, unconverged_solve 2; 3 steps computed once more, 1 without an update"
    )


def test_a_run_that_gives_up_blames_what_forbade_the_updates_and_not_what_it_was_only_warned_of():
    faults = {"loss_spike": 5.0, "unconverged_adjoint": 2.0}
    policies = config(loss_spike="warn", unconverged_adjoint="skip")
    give_up(30, policies, faults, num_skipped_in_a_row=MAX_SKIPPED_IN_A_ROW - 1)
    with pytest.raises(SolveError, match="step 30: an adjoint solve did not converge") as caught:
        give_up(30, policies, faults, num_skipped_in_a_row=MAX_SKIPPED_IN_A_ROW)
    assert "the loss rose" not in str(caught.value)


@pytest.mark.parametrize(("name", "updates"), [("ignore", True), ("warn", True), ("skip", False), ("raise", False)])
@pytest.mark.parametrize(
    ("fault", "settings"), [("unconverged_adjoint", TINY_ADJOINT), ("unconverged_solve", TINY_SOLVE)]
)
def test_an_unconverged_solve_is_counted_and_updates_the_weights_if_the_policy_says_so(
    tmp_path, fault, settings, name, updates
):
    recipe = make_recipe(tmp_path, *settings, policy(name, fault))
    accelerator = Accelerator()
    state, *_ = make_state(recipe, accelerator)
    lr, weights = state.schedule.get_last_lr(), copy_of_weights(state)
    result = one_step(recipe, state, accelerator)
    kind = "adjoint" if fault == "unconverged_adjoint" else "solver"
    residuals = getattr(state.interval, f"{kind}_residuals")
    assert result.faults == {fault: max(residuals)}
    assert same(weights, state.model.parameters()) == (not updates)
    assert (state.optimizer.state == {}) == (not updates)
    assert state.memory is not None
    assert state.interval.num_targets == 64
    assert state.schedule.get_last_lr() != lr
    assert all(parameter.grad is None for parameter in state.model.parameters())
    assert state.interval.account == state.progress.account == Account({fault: 1}, num_skipped=int(not updates))
    assert state.progress.num_skipped_in_a_row == int(not updates)
    if name == "ignore":
        assert result.records == []
    else:
        (record,) = result.records
        solves = state.interval.solver_residuals + state.interval.adjoint_residuals
        worst = solves.index(max(solves)) % 8
        assert record == {
            "faults": result.faults,
            "policy": name,
            "epoch": 0,
            "segment": 0,
            "worst_solve": {"residual": max(solves), "segment": worst // 4, "stream": worst % 4},
        }


@pytest.mark.parametrize(
    ("fault", "settings"), [("unconverged_adjoint", TINY_ADJOINT), ("unconverged_solve", TINY_SOLVE)]
)
@pytest.mark.parametrize("enough", [True, False])
def test_a_step_that_is_computed_again_has_twice_the_budget_and_is_skipped_if_that_does_not_help(
    tmp_path, fault, settings, enough
):
    changes = ENOUGH_IF_DOUBLED[fault] if enough else ()
    recipe = make_recipe(tmp_path, *settings, *changes, policy("retry", fault), "model.cell.dropout=0.0")
    accelerator = Accelerator()
    state, *_ = make_state(recipe, accelerator)
    weights, memories, segments = copy_of_weights(state), [], []
    forward = state.model.forward
    with ExitStack() as stack:
        stack.enter_context(forward_changed(state.model, lambda _, kwargs: memories.append(kwargs["memory"])))
        counted = state.model.forward
        state.model.forward = lambda ids, **kwargs: (segments.append(ids), counted(ids, **kwargs))[1]
        result = one_step(recipe, state, accelerator)
    state.model.forward = forward
    assert len(segments) == 4  # two, twice
    assert segments[0].equal(segments[2])
    assert memories[0] is memories[2] is None
    assert memories[1] is not memories[3]
    assert result.records[0]["policy"] == "retry"
    assert state.progress.account.num_retried == 1
    assert (result.faults == {}) == enough
    assert same(weights, state.model.parameters()) == (not enough)
    kind = "adjoint" if fault == "unconverged_adjoint" else "solver"
    assert max(getattr(state.interval, f"{kind}_evaluations")) > (4 if enough else 2)
    assert len(state.interval.solver_evaluations) == 8  # of the second time


def test_a_computation_that_was_not_finite_by_accident_is_made_good_by_the_second(tmp_path):
    budgets = [  # solves that meet their rule long before
        "model.stopping={max_steps: 60, rtol: 3.0e-2}",
        "model.adjoint={name: implicit, stopping: {max_steps: 60, rtol: 1.0e-1}}",
    ]
    recipe = make_recipe(tmp_path, *PLAIN, *TINY_ADJOINT[2:], *budgets, "training.faults.not_finite=retry")
    accelerator = Accelerator()
    states = [make_state(recipe, accelerator)[0] for _ in range(2)]
    calls = []

    def once(output, kwargs):
        calls.append(1)
        if len(calls) == 1:
            not_finite(output, kwargs)

    with forward_changed(states[0].model, once):
        result = one_step(recipe, states[0], accelerator)
    one_step(recipe, states[1], accelerator)
    assert result.faults == {}
    assert [record["faults"] for record in result.records] == [{"not_finite": None}]
    assert states[0].progress.account == Account({}, num_retried=1, num_skipped=0)
    assert states[0].optimizer.state != {}
    assert min(states[0].interval.solver_outcomes + states[0].interval.adjoint_outcomes) == 0
    assert same(copy_of_weights(states[0]), states[1].model.parameters())
    assert states[0].memory is not None


@contextmanager
def losses_raised(model, by_nats: float):
    def change(output, _):
        output.nll_nats = output.nll_nats + by_nats * 32  # targets of a segment

    with forward_changed(model, change):
        yield


@pytest.mark.parametrize(("name", "updates"), [("warn", True), ("skip", False)])
def test_a_loss_that_jumps_above_its_running_mean_is_a_spike(tmp_path, name, updates):
    recipe = make_recipe(tmp_path, policy(name, "loss_spike"), policy("ignore"))
    accelerator = Accelerator()
    state, *_ = make_state(recipe, accelerator)
    assert one_step(recipe, state, accelerator).faults == {}
    mean = state.progress.mean_nats_per_token
    weights = copy_of_weights(state)
    with losses_raised(state.model, 2.5):
        assert one_step(recipe, state, accelerator).faults == {}
    weights = copy_of_weights(state)
    with losses_raised(state.model, 4.0):
        result = one_step(recipe, state, accelerator)
    assert list(result.faults) == ["loss_spike"]
    assert 3.0 < result.faults["loss_spike"] < 4.5
    assert state.progress.mean_nats_per_token > mean
    assert same(weights, state.model.parameters()) == (not updates)


def test_every_one_of_twenty_spikes_is_skipped_and_recorded_and_all_other_steps_go_on(tmp_path, monkeypatch):
    steps, spikes = 70, range(5, 45, 2)
    recipe = make_recipe(
        tmp_path,
        *PLAIN,
        policy("skip", "loss_spike"),
        policy("ignore"),
        f"training.max_steps={steps}",
        f"training.schedule.decay_steps={steps}",
        "training.jacobian=null",
        "training.gradient_accumulation=1",
        "training.evaluate_every=null",
        "training.checkpoint_every=100",
    )
    step_of = loop.train_step

    def with_spikes(accelerator, model, state, *arguments, **options):
        is_spike = state.progress.step + 1 in spikes
        with losses_raised(state.model, 8.0 * is_spike):
            return step_of(accelerator, model, state, *arguments, **options)

    monkeypatch.setattr(loop, "train_step", with_spikes)
    train(recipe)
    assert [record["step"] for record in metrics(recipe, "fault")] == list(spikes)
    lines = metrics(recipe, "train")
    assert [line["step"] for line in lines if line["skipped"]] == list(spikes)
    assert len(lines) - len(spikes) == 50
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_a_loss_that_stays_high_is_taken_for_the_new_level_before_the_run_gives_up(tmp_path):
    recipe = make_recipe(tmp_path, policy("skip", "loss_spike"), policy("ignore"), "training.schedule.decay_steps=40")
    accelerator = Accelerator()
    state, *_ = make_state(recipe, accelerator)
    one_step(recipe, state, accelerator)
    with losses_raised(state.model, 6.0):
        found = [bool(one_step(recipe, state, accelerator).faults) for _ in range(MAX_SKIPPED_IN_A_ROW)]
    assert found[0]
    assert not found[-1]


@pytest.mark.parametrize(
    "override",
    [
        "model.adjoint.stopping={max_steps: 30, rtol: 1.0e-4}",  # enough
        "training.faults.unconverged_adjoint.limit=10.0",
        "model.adjoint={name: phantom}",
        "model.adjoint={name: jacobian_free}",
        "training.phases=[{until: 1.0, num_unrolled_steps: 2}]",
    ],
)
def test_an_adjoint_that_converged_or_is_not_solved_for_is_no_fault(tmp_path, override):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnusedSettingWarning)
        recipe = make_recipe(tmp_path, *TINY_ADJOINT, policy("skip"), override)
    accelerator = Accelerator()
    state, *_ = make_state(recipe, accelerator)
    weights = copy_of_weights(state)
    assert one_step(recipe, state, accelerator).faults == {}
    assert state.progress.account == Account()
    assert not same(weights, state.model.parameters())


def test_a_step_that_is_not_finite_has_no_other_fault(tmp_path):
    recipe = make_recipe(tmp_path, *TINY_ADJOINT, policy("skip"))
    accelerator = Accelerator()
    state, *_ = make_state(recipe, accelerator)
    with forward_changed(state.model, not_finite):
        result = one_step(recipe, state, accelerator)
    assert result.faults == {"not_finite": None}
    assert state.memory is None
    assert state.progress.account == Account({"not_finite": 1}, num_skipped=1)


@pytest.mark.parametrize("kind", ["solver", "adjoint"])
def test_a_residual_that_is_not_a_number_is_the_largest(tmp_path, monkeypatch, kind):
    name = {"solver": "unconverged_solve", "adjoint": "unconverged_adjoint"}[kind]
    recipe = make_recipe(tmp_path, *TINY_ADJOINT[2:], policy("skip", name))
    accelerator = Accelerator()
    state, *_ = make_state(recipe, accelerator)
    facts_of = step.facts_of

    def broken(solution, **kwargs):
        facts = facts_of(solution, **kwargs)
        if (solution is state.model.adjoint_solution) == (kind == "adjoint"):
            facts["residuals"][1] = float("nan")
        return facts

    assert one_step(recipe, state, accelerator).faults == {}
    monkeypatch.setattr(step, "facts_of", broken)
    assert one_step(recipe, state, accelerator).faults == {name: None}


def test_the_statistics_of_a_step_are_those_of_its_solutions(tmp_path):
    recipe = make_recipe(tmp_path, *PLAIN, "model.stopping.max_steps=3", "training.log_every=2")
    accelerator = Accelerator()
    state, *_ = make_state(recipe, accelerator)
    leave_weights_alone(state)
    solutions = {"solver": [], "adjoint": []}
    backward = accelerator.backward

    def recorded(loss):
        backward(loss)
        solutions["adjoint"].append(state.model.adjoint_solution)

    accelerator.backward = recorded
    with forward_changed(state.model, lambda output, _: solutions["solver"].append(output.solution)):
        for _ in range(2):
            one_step(recipe, state, accelerator)
    line = summarize([state.interval])
    for name, found in solutions.items():
        assert len(found) == 4
        evaluations = torch.cat([solution.num_evaluations for solution in found]).double()
        residuals = torch.cat([solution.relative_residual for solution in found]).double()
        assert line[f"{name}_evaluations"] == pytest.approx(evaluations.mean().item(), rel=1e-12)
        assert line[f"{name}_evaluations_max"] == evaluations.max().item()
        assert line[f"{name}_residual"] == residuals.quantile(0.5).item()
        assert line[f"{name}_residual_max"] == residuals.max().item()
        converged = torch.cat([solution.converged for solution in found])
        assert line[f"{name}_share_converged"] == converged.double().mean().item()
        fallbacks = torch.cat([solution.used_fallback for solution in found])
        assert line[f"{name}_share_fallback"] == fallbacks.double().mean().item()
    assert line["solver_share_converged"] < line["adjoint_share_converged"] <= 1.0


def test_an_unrolled_model_has_evaluations_but_no_rule_to_meet(tmp_path):
    recipe = make_recipe(
        tmp_path,
        "training.phases=[]",
        "model.depth=unrolled",
        "model.num_layers=3",
        "model.stopping={}",
        policy("ignore"),
    )
    accelerator = Accelerator()
    state, *_ = make_state(recipe, accelerator)
    one_step(recipe, state, accelerator)
    line = summarize([state.interval])
    assert line["solver_evaluations"] == 3
    missing = ("solver_share_converged", "solver_share_fallback", "adjoint_residual", "adjoint_share_converged")
    assert [line[name] for name in missing] == [None] * 4


@pytest.mark.parametrize("name", ["warn", "skip"])
def test_faults_are_reported_once_per_line_of_metrics_recorded_each_and_counted_at_the_end(tmp_path, capsys, name):
    settings = ("training.max_steps=6", "training.evaluate_every=null", "training.log_every=3")
    recipe = make_recipe(
        tmp_path, *TINY_ADJOINT, *settings, policy(name), "training.phases=[{until: 0.25, num_unrolled_steps: 2}]"
    )
    train(recipe)
    output = capsys.readouterr().out.splitlines()
    limit = f"(training.faults.unconverged_adjoint.limit 0.1, policy {name})"
    assert [line for line in output if "did not converge" in line] == [
        f"step 3: warning: an adjoint solve did not converge in 1 of 3 steps {limit}",
        f"step 6: warning: an adjoint solve did not converge in 3 of 3 steps {limit}",
    ]
    first, second = metrics(recipe, "train")
    skipped = [1, 3] if name == "skip" else [0, 0]
    assert [(line["unconverged_adjoint"], line["skipped"]) for line in (first, second)] == [
        (1, skipped[0]),
        (3, skipped[1]),
    ]
    assert second["loss"] is not None
    records = metrics(recipe, "fault")
    assert [record["step"] for record in records] == [3, 4, 5, 6]
    assert [record["segment"] for record in records] == [4, 6, 8, 10]
    assert {record["policy"] for record in records} == {name}
    (account,) = metrics(recipe, "faults")
    assert account["num_steps"] == {"unconverged_adjoint": 4}
    assert f"faults in 6 steps: unconverged_adjoint 4; 0 steps computed once more, {sum(skipped)} without" in "".join(
        output
    )


def test_ignored_faults_are_only_counted(tmp_path, capsys):
    recipe = make_recipe(tmp_path, *TINY_ADJOINT, policy("ignore"), "training.max_steps=2")
    train(recipe)
    assert "did not converge" not in capsys.readouterr().out
    assert [line["unconverged_adjoint"] for line in metrics(recipe, "train")] == [1, 1]
    assert metrics(recipe, "fault") == []


def test_a_run_gives_up_after_too_many_steps_skipped_for_their_adjoints(tmp_path):
    steps = ("training.max_steps=40", "training.schedule.decay_steps=40", "training.checkpoint_every=100")
    recipe = make_recipe(tmp_path, *TINY_ADJOINT, policy("skip"), *steps)
    with pytest.raises(SolveError, match=rf"step {MAX_SKIPPED_IN_A_ROW}: .*no update for {MAX_SKIPPED_IN_A_ROW} steps"):
        train(recipe)
    assert sum(line["skipped"] for line in metrics(recipe, "train")) == MAX_SKIPPED_IN_A_ROW - 1


def test_a_run_that_raises_leaves_the_checkpoint_before_and_goes_on_under_another_policy(tmp_path):
    shallow = "training.phases=[{until: 0.375, num_unrolled_steps: 2}]"  # three steps; checkpoints at 2, 4, ...
    overrides = (*TINY_ADJOINT, shallow, "training.evaluate_every=null")
    recipe = make_recipe(tmp_path, *overrides, policy("raise"))
    with pytest.raises(SolveError) as caught:
        train(recipe)
    words = str(caught.value)
    assert words.startswith(
        "step 4: an adjoint solve did not converge (training.faults.unconverged_adjoint.limit 0.1, value "
    )
    for remedy in (
        "--resume",
        "training.faults.unconverged_adjoint.policy=warn",
        "model.adjoint.stopping.max_steps",
        "training.optimizer.lr",
    ):
        assert remedy in words
    assert "\n" not in words
    assert [record["step"] for record in metrics(recipe, "fault")] == [4]
    checkpoints = Path(recipe.training.output_dir) / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step_00000002"]
    assert damage(checkpoints / "step_00000002") is None
    with pytest.raises(SolveError, match="step 4: "):
        train(recipe, resume=True)
    train(make_recipe(tmp_path, *overrides, policy("warn")), resume=True)
    assert (checkpoints / "step_00000008").is_dir()
