"""Phases, jitter and the growth of the regularization: planned right, used, and resumed."""

from __future__ import annotations

import random
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tiny_run import forward_changed, make_recipe, make_state, metrics, one_step

from deq_lm.adjoints import Implicit, Phantom
from deq_lm.errors import CheckpointError, ConfigError, UnusedSettingWarning
from deq_lm.solvers import StoppingRule
from deq_lm.training import train
from deq_lm.training.phases import GrowthConfig, JacobianConfig, PhaseConfig, StepPlan, plan_step
from deq_lm.training.recipe import load_recipe

PHANTOM = {"name": "phantom", "num_steps": 1, "relaxation": 0.5}
CURRICULUM = (
    PhaseConfig(until=0.2, num_unrolled_steps=2),
    PhaseConfig(until=0.8, max_steps=4, adjoint=PHANTOM, regularize=False),
)
plan = partial(
    plan_step, phases=(), num_steps=10, stopping=StoppingRule(max_steps=30, rtol=1e-4), jitter=0, jacobian=None
)
RECIPES = Path(__file__).resolve().parents[2] / "recipes"
grow = partial(GrowthConfig, first_step=0, max_weight=None)
SETTINGS = (
    "training.phases=[{until: 0.25, num_unrolled_steps: 3}, "
    "{until: 0.625, max_steps: 2, adjoint: {name: phantom, num_steps: 1, relaxation: 0.5}}]",
    "model.stopping={max_steps: 5, rtol: 0.0, patience: null}",
    "training.faults.unconverged_adjoint.policy=ignore",
)


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def test_each_step_belongs_to_the_first_phase_that_has_not_ended():
    jacobian = JacobianConfig(weight=2.0, probability=0.5, growth=None)
    plans = [plan(step, phases=CURRICULUM, jacobian=jacobian) for step in range(10)]
    assert plans[:2] == [StepPlan(num_unrolled_steps=2)] * 2
    shallow = StepPlan(stopping=StoppingRule(max_steps=4, rtol=1e-4), adjoint=Phantom(num_steps=1, relaxation=0.5))
    assert plans[2:8] == [shallow] * 6
    assert plans[8:] == [StepPlan(jacobian_weight=2.0)] * 2


def test_a_jitter_cuts_the_budget_of_the_phase_evenly_and_never_an_unrolled_step():
    random.seed(0)
    cuts = Counter(30 - (plan(9, jitter=2).stopping or StoppingRule(max_steps=30)).max_steps for _ in range(3000))
    assert set(cuts) == {0, 1, 2}
    assert all(900 < count < 1100 for count in cuts.values())
    found = {(plan(3, phases=CURRICULUM, jitter=2).stopping).max_steps for _ in range(50)}
    assert found == {2, 3, 4}
    state = random.getstate()
    assert plan(0, phases=CURRICULUM, jitter=2) == StepPlan(num_unrolled_steps=2)
    assert random.getstate() == state


@pytest.mark.parametrize(
    ("growth", "weights"),
    [
        (None, [1.0] * 6),
        (grow(every_steps=2, increase=0.5), [1.0, 1.0, 1.5, 1.5, 2.0, 2.0]),
        (grow(every_steps=1, increase=0.25), [1.0, 1.25, 1.5, 1.75, 2.0, 2.25]),
        (grow(first_step=1, every_steps=2, increase=0.5), [1.0, 1.0, 1.0, 1.5, 1.5, 2.0]),
        (grow(first_step=1, every_steps=1, increase=0.5, max_weight=2.0), [1.0, 1.0, 1.5, 2.0, 2.0, 2.0]),
        (grow(every_steps=1, increase=0.4, max_weight=1.5), [1.0, 1.4, 1.5, 1.5, 1.5, 1.5]),
    ],
)
def test_the_weight_of_the_regularization_grows_as_it_says(growth: GrowthConfig | None, weights: list[float]):
    jacobian = JacobianConfig(weight=1.0, probability=1.0, growth=growth)
    assert [plan(step, jacobian=jacobian).jacobian_weight for step in range(6)] == weights


def test_as_published_the_regularization_does_not_grow_in_the_shallow_steps():
    jacobian = load_recipe(RECIPES / "wikitext103_deq_jacreg_preln.yaml").training.jacobian
    steps = (32_000, 59_999, 60_000, 89_999, 90_000, 249_999)
    assert [jacobian.weight_at(step) for step in steps] == pytest.approx([2.0, 2.0, 2.1, 2.1, 2.2, 2.7])


def test_a_weight_that_grows_from_zero_costs_nothing_until_it_has(tmp_path: Path):
    recipe = make_recipe(
        tmp_path,
        "training.phases=[]",
        "training.jacobian={weight: 0.0, probability: 1.0, growth: {first_step: 1, every_steps: 1, increase: 0.1, "
        "max_weight: null}}",
    )
    accelerator = Accelerator(cpu=True)
    state, _, _ = make_state(recipe, accelerator)
    seen = []
    with forward_changed(state.model, lambda _, kwargs: seen.append(kwargs["estimate_jacobian"])):
        for _ in range(3):
            one_step(recipe, state, accelerator)
    assert seen == [False] * 4 + [True] * 2


def test_power_iterations_make_the_regularization_spectral_which_is_larger(tmp_path: Path):
    found = {}
    for power_iterations in ("null", "1", "20"):
        recipe = make_recipe(
            tmp_path,
            "training.phases=[]",
            "training.jacobian.probability=1.0",
            f"training.jacobian.power_iterations={power_iterations}",
        )
        accelerator = Accelerator(cpu=True)
        state, _, _ = make_state(recipe, accelerator)
        values = []
        with forward_changed(state.model, lambda output, _, values=values: values.append(output.jacobian.item())):
            one_step(recipe, state, accelerator)
        found[power_iterations] = values[0]
    assert 1.1 * found["null"] < found["1"] < found["20"]


def test_the_loop_does_what_is_planned(tmp_path: Path):
    recipe = make_recipe(tmp_path, *SETTINGS, "training.jacobian=null")
    accelerator = Accelerator(cpu=True)
    state, _, _ = make_state(recipe, accelerator)
    seen = []

    def look(output, kwargs) -> None:
        name = "unrolled" if kwargs["num_unrolled_steps"] else type(kwargs["adjoint"] or Implicit()).__name__
        seen.append((name, int(output.solution.num_evaluations.max())))

    with forward_changed(state.model, look):
        for _ in range(8):
            one_step(recipe, state, accelerator)
    segments = recipe.training.gradient_accumulation
    expected = [("unrolled", 3)] * 2 + [("Phantom", 3)] * 3 + [("Implicit", 6)] * 3
    assert seen == [entry for entry in expected for _ in range(segments)]


def test_a_growing_weight_reaches_the_gradient(tmp_path: Path):
    norms = []
    for growth in ("null", "{first_step: 0, every_steps: 1, increase: 1.0e+6, max_weight: null}"):
        recipe = make_recipe(
            tmp_path, "training.phases=[]", f"training.jacobian={{weight: 0.1, probability: 1.0, growth: {growth}}}"
        )
        accelerator = Accelerator(cpu=True)
        state, _, _ = make_state(recipe, accelerator)
        norms.append([one_step(recipe, state, accelerator).grad_norm for _ in range(2)])
    assert norms[0][0] == norms[1][0]
    assert norms[1][1] > 1000 * norms[0][1]


def test_evaluation_goes_by_the_model_section(tmp_path: Path):
    recipe = make_recipe(
        tmp_path, *SETTINGS, "training.jacobian=null", "training.max_steps=4", "training.evaluate_every=1"
    )
    assert train(recipe) is None
    assert {record["solver_evaluations_max"] for record in metrics(recipe, "valid")} == {6}


@pytest.mark.parametrize("stop", [3, 5])
def test_a_run_continued_across_phases_with_jitter_is_the_uninterrupted_one(tmp_path: Path, stop: int):
    settings = (*SETTINGS, "training.max_steps_jitter=2", "training.checkpoint_every=1")
    whole = make_recipe(tmp_path, *settings)
    assert train(whole) is None
    first, second = (
        make_recipe(tmp_path, *settings, f"training.output_dir={tmp_path}/again", f"training.max_steps={steps}")
        for steps in (stop, 8)
    )
    assert train(first) is None
    assert train(second, resume=True) is None
    a, b = (load_file(Path(recipe.training.output_dir) / "final" / "model.safetensors") for recipe in (whole, second))
    assert all(torch.equal(a[name], b[name]) for name in a)
    evaluations = [record["solver_evaluations_max"] for record in metrics(whole, "train")]
    assert len(set(evaluations[5:])) > 1 or len(set(evaluations[2:5])) > 1


def test_a_run_says_where_its_phases_end(tmp_path: Path, capsys):
    train(make_recipe(tmp_path, *SETTINGS, "training.max_steps=1"))
    assert "\nphases end at steps 2, 5\n" in capsys.readouterr().out


def test_phases_are_the_steps_they_end_at_and_may_not_change(tmp_path: Path):
    settings = (
        "training.schedule={name: constant, warmup_steps: 0, decay_steps: null, final_lr_ratio: null}",
        "training.evaluate_every=null",
        "training.jacobian=null",
    )

    def recipe(num_steps: int, until: float, adjoint: str = "{name: phantom}"):
        phases = f"training.phases=[{{until: {until}, max_steps: 2, adjoint: {adjoint}}}]"
        return make_recipe(tmp_path, *settings, phases, f"training.max_steps={num_steps}")

    train(recipe(2, 0.5))
    with pytest.raises(CheckpointError, match=r"belongs to another run \(phases: .*\"until\": 1,.*\"until\": 2,"):
        train(recipe(4, 0.5), resume=True)  # what was step 2 of 4 would be a step of the phase again
    with pytest.raises(CheckpointError, match=r"\(phases: .*\"num_steps\": 5.* there, .*\"num_steps\": 3"):
        train(recipe(4, 0.25, "{name: phantom, num_steps: 3}"), resume=True)
    spelled_out = "{name: phantom, num_steps: 5, relaxation: 0.8}"
    assert train(recipe(4, 0.25, spelled_out), resume=True) is None


GROWTH = "training.jacobian.growth="


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.phases=[{until: 0.0, max_steps: 3}]", "recipe.training.phases[0]: until=0.0: expected a share"),
        ("training.phases=[{until: 1.5, max_steps: 3}]", "until=1.5: expected a share"),
        ("training.phases=[{until: 0.5}]", "nothing differs from the model section in this phase"),
        ("training.phases=[{until: 0.5, num_unrolled_steps: 0}]", "num_unrolled_steps=0: expected 1 or more, or null"),
        ("training.phases=[{until: 0.5, max_steps: 0}]", "max_steps=0: expected 1 or more, or null"),
        (
            "training.phases=[{until: 0.5, num_unrolled_steps: 2, max_steps: 3}]",
            "num_unrolled_steps=2 with max_steps: a step either goes through plain evaluations or solves",
        ),
        (
            "training.phases=[{until: 0.5, max_steps: 3}, {until: 0.5, max_steps: 4}]",
            "phases end at [0.5, 0.5]: expected rising shares",
        ),
        ("training.phases=[{until: 0.5, max_step: 3}]", "phases[0].max_step: unknown key; did you mean max_steps?"),
        (
            "training.phases=[{until: 0.5, adjoint: {name: phantm}}]",
            "training.phases[0].adjoint.name: the text 'phantm' is not known",
        ),
        (
            "training.phases=[{until: 0.5, adjoint: {name: reversible}}]",
            "training.phases[0].adjoint: The adjoint 'reversible' around Broyden",
        ),
        ("training.max_steps_jitter=-1", "max_steps_jitter=-1: expected 0 (none) or more"),
        ("training.max_steps_jitter=7", "training.max_steps_jitter=7: expected at most 6, the smallest budget"),
        (
            "training.phases=[{until: 0.25, num_unrolled_steps: 2}, {until: 0.5, adjoint: {name: unrolled}}]",
            "training.phases[1].adjoint: unrolled with the solver Broyden",
        ),
        ("training.phases=[{until: 0.5, max_steps: 3}, {until: 0.25, max_steps: 4}]", "phases end at [0.5, 0.25]"),
        ("training.phases=null", "recipe.training.phases: expected a list"),
        ("training.phases=[{max_steps: 3}]", "recipe.training.phases[0]: missing until"),
        (f"{GROWTH}{{first_step: -1, every_steps: 5, increase: 0.1, max_weight: null}}", "first_step=-1: expected 0"),
        (f"{GROWTH}{{first_step: 0, every_steps: 0, increase: 0.1, max_weight: null}}", "every_steps=0: expected 1"),
        (f"{GROWTH}{{first_step: 0, every_steps: 5, increase: 0.0, max_weight: null}}", "increase=0.0: expected more"),
        (
            f"{GROWTH}{{first_step: 0, every_steps: 5, increase: 0.1, max_weight: 0.1}}",
            "recipe.training.jacobian: growth.max_weight=0.1: expected more than weight=0.1",
        ),
        ("training.jacobian.weight=0.0", "weight=0.0: expected more than 0, or 0 with a growth"),
        (
            "training.jacobian.power_iterations=0",
            "recipe.training.jacobian: power_iterations=0: expected 1 or more (spectral norm), or null (Frobenius norm)",
        ),
        (
            "training.phases=[{until: 0.5, adjoint: {name: implicit, stopping: {rtol: 0.2}}}]",
            "limit=0.1: expected at",
        ),
    ],
)
def test_a_wrong_schedule_is_refused_at_its_place(tmp_path: Path, override: str, words: str):
    with pytest.raises(ConfigError) as caught:
        make_recipe(tmp_path, override)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("depth", "override", "words"),
    [
        ("unrolled", "training.max_steps_jitter=1", "training.max_steps_jitter: is for an equilibrium"),
        ("stack", "training.jacobian={weight: 1.0, probability: 1.0, growth: null}", "training.jacobian: is for an"),
        ("unrolled", "training.phases=[{until: 0.5, max_steps: 3}]", "training.phases: is for an equilibrium"),
        ("stack", "training.phases=[{until: 0.5, num_unrolled_steps: 2}]", "training.phases: is for an equilibrium"),
    ],
)
def test_what_needs_a_solve_is_refused_without_one(tmp_path: Path, depth: str, override: str, words: str):
    rival = (
        f"model.depth={depth}",
        "model.num_layers=3",
        "model.stopping={}",
        "training.phases=[]",
        "training.jacobian=null",
        "training.faults.unconverged_adjoint.policy=ignore",
    )
    make_recipe(tmp_path, *rival)
    with pytest.raises(ConfigError, match=words):
        make_recipe(tmp_path, *rival, override)


def test_the_policy_for_adjoint_solves_looks_at_the_adjoints_of_all_phases(tmp_path: Path):
    jacobian_free = "model.adjoint={name: jacobian_free}"
    with pytest.warns(UnusedSettingWarning, match="no effect in a run without such a solve"):
        make_recipe(tmp_path, jacobian_free)
    make_recipe(tmp_path, jacobian_free, "training.phases=[{until: 0.5, adjoint: {name: implicit}}]")
    with pytest.warns(UnusedSettingWarning, match="no effect in a run without such a solve"):
        make_recipe(tmp_path, "training.phases=[{until: 1.0, adjoint: {name: phantom}}]")
    loose = "model.adjoint={name: implicit, stopping: {rtol: 0.2}}"  # which no step goes by
    make_recipe(tmp_path, loose, "training.phases=[{until: 1.0, adjoint: {name: implicit}}]")


UNROLLED_TO_THE_END = "training.phases=[{until: 1.0, num_unrolled_steps: 2}]"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["training.phases=[{until: 0.05, max_steps: 2}]"],
            r"training\.phases\[0\]: until=0\.05 of 8 steps is step 0, where it begins\. Give a larger share",
        ),
        (
            ["training.phases=[{until: 0.5, max_steps: 2}, {until: 0.51, max_steps: 3}]"],
            r"training\.phases\[1\]: until=0\.51 of 8 steps is step 4",
        ),
        (
            ["training.phases=[{until: 0.5, max_steps: 2, regularize: false}]", "training.jacobian=null"],
            r"training\.phases\[0\]\.regularize=false: there is no regularization \(training\.jacobian\) in it",
        ),
        (
            ["training.phases=[{until: 0.5, num_unrolled_steps: 2, regularize: false}]"],
            r"training\.phases\[0\]\.regularize=false: there is no solve in it",
        ),
        (
            [UNROLLED_TO_THE_END, "training.jacobian=null", "training.max_steps_jitter=1"],
            r"training\.max_steps_jitter=1: no step of the run solves\. Give 0",
        ),
        ([UNROLLED_TO_THE_END], r"training\.jacobian: the phases leave no step that it is for\. Give null"),
        (
            ["training.phases=[{until: 1.0, regularize: false}]"],
            r"training\.jacobian: the phases leave no step that it is for\. Give null",
        ),
    ],
)
def test_what_has_no_effect_warns(tmp_path: Path, overrides: list[str], words: str):
    with pytest.warns(UnusedSettingWarning, match=words) as caught:
        make_recipe(tmp_path, *overrides, "training.faults.unconverged_adjoint.policy=ignore")
    assert len(caught) == 1


def test_a_jitter_is_held_to_the_budgets_that_are_used(tmp_path: Path):
    make_recipe(tmp_path, "training.phases=[{until: 1.0, max_steps: 9}]", "training.max_steps_jitter=9")
    with pytest.raises(ConfigError, match=r"max_steps_jitter=3: expected at most 2, the smallest budget"):
        make_recipe(tmp_path, "training.phases=[{until: 0.5, max_steps: 2}]", "training.max_steps_jitter=3")
