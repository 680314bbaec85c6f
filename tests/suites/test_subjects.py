"""Which models a suite is about: by name, recipe or run folder, and never one trained in another way."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from deq_lm.errors import CheckpointError, ConfigError
from deq_lm.suites import load_suite, subjects_of
from deq_lm.suites.config import ModelConfig, Suite

ROOT = Path(__file__).resolve().parents[2]


def suite_of(recipes: dict[str, Path], **settings) -> Suite:
    return Suite(name="tiny", models={name: ModelConfig(str(path)) for name, path in recipes.items()}, **settings)


@pytest.mark.parametrize("path", sorted((ROOT / "eval" / "suites").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_suite_loads_and_its_recipes_too(path: Path, monkeypatch):
    monkeypatch.chdir(ROOT)
    suite = load_suite(path)
    assert suite.name == path.stem
    if suite.models:
        assert subjects_of(suite, runs=Path("none"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nmodels: {}\nseeds: []", r"seeds=\[\]: expected one or more"),
        ("name: a\nmodels: {}\nmemory: {num_evaluations: [0]}", r"num_evaluations=\[0\]: expected numbers of 1"),
        ("name: a\nmodels: {}\nconvergence: {num_evaluations: [5, 3]}", r"num_evaluations=\[5, 3\]: expected rising"),
        ("name: a\nmodels: {}\ncosts: {}", "costs: unknown key; did you mean cost"),
    ],
)
def test_a_wrong_suite_is_refused_by_name(tmp_path, text: str, message: str):
    path = tmp_path / "suite.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_suite(path)


def test_every_model_has_every_seed_and_a_run_folder_of_its_own(recipes, tmp_path):
    found = subjects_of(suite_of(recipes, seeds=(3, 4)), overrides=["training.max_steps=5"], runs=tmp_path)
    assert [subject.label for subject in found] == ["equilibrium_3", "equilibrium_4", "unrolled_3", "unrolled_4"]
    assert [subject.run.path for subject in found] == [tmp_path / subject.label for subject in found]
    assert all(subject.recipe.training.max_steps == 5 and not subject.is_trained for subject in found)
    assert [subject.recipe.seed for subject in found] == [3, 4, 3, 4]


def test_what_a_model_of_a_suite_sets_for_itself_is_not_replaced(recipes, tmp_path):
    longer = ModelConfig(str(recipes["unrolled"]), ("training.max_steps=7",))
    suite = suite_of(recipes)
    suite = replace(suite, models={**suite.models, "longer": longer})
    found = subjects_of(suite, overrides=["training.max_steps=5"], runs=tmp_path)
    assert {subject.name: subject.recipe.training.max_steps for subject in found} == {
        "equilibrium": 5,
        "unrolled": 5,
        "longer": 7,
    }


def test_models_are_chosen_by_name_recipe_or_run_folder(recipes, subjects, tmp_path):
    models = ["unrolled", f"mine={recipes['equilibrium']}", f"old={subjects[0].run.path}", str(subjects[1].run.path)]
    found = subjects_of(suite_of(recipes), models=models, runs=tmp_path)
    assert [subject.label for subject in found] == ["unrolled_0", "mine_0", "old_1", "unrolled_1"]
    assert [subject.is_trained for subject in found] == [False, False, True, True]


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (["unroled"], "no model of the suite tiny; did you mean unrolled"),
        (["unrolled", "unrolled"], "two models unrolled_0"),
    ],
)
def test_a_wrong_choice_is_refused(recipes, tmp_path, models: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        subjects_of(suite_of(recipes), models=models, runs=tmp_path)


def test_a_suite_without_models_says_how_to_give_some(tmp_path):
    with pytest.raises(ConfigError, match="Give some, for example --models"):
        subjects_of(Suite(name="none", models={}), runs=tmp_path)


def test_a_run_of_another_recipe_is_not_taken_for_this_one(recipes, subjects):
    runs = subjects[0].run.path.parent
    (subject,) = subjects_of(suite_of(recipes), models=["equilibrium"], seeds=[1], runs=runs)
    assert subject.is_trained
    with pytest.raises(CheckpointError, match=r"is of another recipe .*training.optimizer.lr: 0.01 there, 0.02 here"):
        subjects_of(
            suite_of(recipes), models=["equilibrium"], seeds=[1], overrides=["training.optimizer.lr=0.02"], runs=runs
        )


def test_a_finished_run_without_its_recipe_is_not_taken_for_any(recipes, subjects, tmp_path):
    run = shutil.copytree(subjects[0].run.path, tmp_path / "equilibrium_1")
    (run / "recipe.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"has a final model and no recipe\.yaml.*Remove the folder"):
        subjects_of(suite_of(recipes), models=["equilibrium"], seeds=[1], runs=tmp_path)


def test_a_model_without_a_finished_run_says_so(recipes, tmp_path):
    (subject,) = subjects_of(suite_of(recipes), models=["unrolled"], runs=tmp_path)
    with pytest.raises(CheckpointError, match="no finished run of unrolled with seed 0"):
        subject.check_is_trained()
