"""Adjoint solves that do not converge: counted, reported, and what the recipe says becomes of the step."""

import warnings
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from tiny_run import PLAIN, forward_changed, leave_weights_alone, make_recipe, make_state, metrics, not_finite, one_step

from deq_lm.errors import SolveError, UnusedSettingWarning
from deq_lm.training import loop
from deq_lm.training.checkpoint import damage
from deq_lm.training.loop import MAX_SKIPPED_IN_A_ROW, train
from deq_lm.training.tracking import summarize

TINY_ADJOINT = (
    "model.adjoint={name: implicit, stopping: {max_steps: 1, rtol: 1.0e-4}}",
    "training.unconverged_adjoint.residual=0.1",
    "training.phases=[]",
    "training.jacobian=null",
    "training.schedule.warmup_steps=0",  # the first step has a rate
)


def policy(name: str) -> str:
    return f"training.unconverged_adjoint.policy={name}"


def copy_of_weights(state):
    return [parameter.detach().clone() for parameter in state.model.parameters()]


def same(weights, others) -> bool:
    return all(a.equal(b) for a, b in zip(weights, others, strict=True))


@pytest.mark.parametrize(("name", "updates"), [("ignore", True), ("warn", True), ("skip", False), ("raise", False)])
def test_an_unconverged_adjoint_is_counted_and_updates_the_weights_if_the_policy_says_so(tmp_path, name, updates):
    recipe = make_recipe(tmp_path, *TINY_ADJOINT, policy(name))
    accelerator = Accelerator()
    state, *_ = make_state(recipe, accelerator)
    lr, weights = state.schedule.get_last_lr(), copy_of_weights(state)
    result = one_step(recipe, state, accelerator)
    assert result.finite
    assert result.unconverged
    assert result.adjoint_residual == max(state.interval.adjoint_residuals) > 0.1
    assert set(state.interval.adjoint_converged) == {0.0}
    assert same(weights, state.model.parameters()) == (not updates)
    assert (state.optimizer.state == {}) == (not updates)
    assert state.memory is not None  # the forward solve has no part in it
    assert state.interval.num_targets == 64
    assert state.schedule.get_last_lr() != lr
    assert all(parameter.grad is None for parameter in state.model.parameters())
    skipped = int(not updates)
    assert (state.interval.num_unconverged, state.interval.num_skipped_unconverged) == (1, skipped)
    assert (state.interval.num_skipped, state.progress.num_skipped) == (0, 0)
    assert (state.progress.num_skipped_unconverged, state.progress.num_skipped_in_a_row) == (skipped, skipped)


@pytest.mark.parametrize(
    "override",
    [
        "model.adjoint.stopping={max_steps: 30, rtol: 1.0e-4}",  # enough
        "training.unconverged_adjoint.residual=10.0",
        "model.adjoint={name: phantom}",
        "model.adjoint={name: jacobian_free}",
        "training.phases=[{until: 1.0, num_unrolled_steps: 2}]",
    ],
)
def test_an_adjoint_that_converged_or_is_not_solved_for_triggers_no_policy(tmp_path, override):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnusedSettingWarning)
        recipe = make_recipe(tmp_path, *TINY_ADJOINT, policy("skip"), override)
    accelerator = Accelerator()
    state, *_ = make_state(recipe, accelerator)
    weights = copy_of_weights(state)
    result = one_step(recipe, state, accelerator)
    assert result.finite
    assert not result.unconverged
    assert (result.adjoint_residual == 0) == (len(state.interval.adjoint_residuals) == 0)
    assert state.interval.num_unconverged == state.progress.num_skipped_in_a_row == 0
    assert not same(weights, state.model.parameters())


def test_a_step_that_is_not_finite_is_not_counted_as_unconverged_too(tmp_path):
    recipe = make_recipe(tmp_path, *TINY_ADJOINT, policy("skip"))
    accelerator = Accelerator()
    state, *_ = make_state(recipe, accelerator)
    with forward_changed(state.model, not_finite):
        result = one_step(recipe, state, accelerator)
    assert (result.finite, result.unconverged) == (False, False)
    assert state.memory is None
    assert (state.progress.num_skipped, state.progress.num_skipped_unconverged) == (1, 0)


def test_an_adjoint_residual_that_is_not_a_number_has_not_converged(tmp_path, monkeypatch):
    recipe = make_recipe(tmp_path, *TINY_ADJOINT[2:], policy("skip"))
    accelerator = Accelerator()
    state, *_ = make_state(recipe, accelerator)
    facts_of = loop.facts_of

    def broken(solution, **kwargs):
        facts = facts_of(solution, **kwargs)
        if solution is state.model.adjoint_solution:
            facts["residuals"][1] = float("nan")
        return facts

    assert not one_step(recipe, state, accelerator).unconverged
    monkeypatch.setattr(loop, "facts_of", broken)
    result = one_step(recipe, state, accelerator)
    assert result.unconverged
    assert result.adjoint_residual == float("inf")


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


@pytest.mark.parametrize(("name", "end"), [("warn", "were made with inexact gradients"), ("skip", "were skipped")])
def test_unconverged_adjoints_are_reported_once_per_line_of_metrics(tmp_path, capsys, name, end):
    settings = ("training.max_steps=6", "training.evaluate_every=null", "training.log_every=3")
    recipe = make_recipe(
        tmp_path, *TINY_ADJOINT, *settings, policy(name), "training.phases=[{until: 0.25, num_unrolled_steps: 2}]"
    )
    train(recipe)
    lines = [line for line in capsys.readouterr().out.splitlines() if "did not converge" in line]
    assert len(lines) == 2
    first, second = metrics(recipe, "train")
    assert lines[0] == (
        f"step 3: warning: an adjoint solve did not converge in 1 of 3 steps (relative residual up to "
        f"{first['adjoint_residual_max']:.2g}, above 0.1); their updates {end}"
    )
    assert lines[1].startswith("step 6: warning: an adjoint solve did not converge in 3 of 3 steps")
    assert [line["adjoint_unconverged"] for line in (first, second)] == [1, 3]
    assert [line["skipped_unconverged"] for line in (first, second)] == ([1, 3] if name == "skip" else [0, 0])
    assert second["loss"] is not None


def test_ignored_unconverged_adjoints_are_only_counted(tmp_path, capsys):
    recipe = make_recipe(tmp_path, *TINY_ADJOINT, policy("ignore"), "training.max_steps=2")
    train(recipe)
    assert "did not converge" not in capsys.readouterr().out
    assert [line["adjoint_unconverged"] for line in metrics(recipe, "train")] == [1, 1]


def test_a_run_gives_up_after_too_many_steps_skipped_for_their_adjoints(tmp_path):
    steps = ("training.max_steps=40", "training.schedule.decay_steps=40", "training.checkpoint_every=100")
    recipe = make_recipe(tmp_path, *TINY_ADJOINT, policy("skip"), *steps)
    with pytest.raises(SolveError, match=rf"step {MAX_SKIPPED_IN_A_ROW}: .*no update for {MAX_SKIPPED_IN_A_ROW} steps"):
        train(recipe)
    assert sum(line["skipped_unconverged"] for line in metrics(recipe, "train")) == MAX_SKIPPED_IN_A_ROW - 1


def test_a_run_that_raises_leaves_the_checkpoint_before_and_goes_on_under_another_policy(tmp_path):
    shallow = "training.phases=[{until: 0.375, num_unrolled_steps: 2}]"  # three steps; checkpoints at 2, 4, ...
    overrides = (*TINY_ADJOINT, shallow, "training.evaluate_every=null")
    recipe = make_recipe(tmp_path, *overrides, policy("raise"))
    with pytest.raises(SolveError) as caught:
        train(recipe)
    words = str(caught.value)
    assert words.startswith("step 4: an adjoint solve did not converge (relative residual ")
    assert "above training.unconverged_adjoint.residual=0.1)" in words
    for remedy in ("--resume", "policy=warn", "model.adjoint.stopping.max_steps", "training.optimizer.lr"):
        assert remedy in words
    assert "\n" not in words
    checkpoints = Path(recipe.training.output_dir) / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step_00000002"]
    assert damage(checkpoints / "step_00000002") is None
    with pytest.raises(SolveError, match="step 4: "):
        train(recipe, resume=True)
    train(make_recipe(tmp_path, *overrides, policy("warn")), resume=True)
    assert (checkpoints / "step_00000008").is_dir()
