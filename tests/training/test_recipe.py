"""Recipes: overrides, ranges, and the words of a refusal."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import recipe_mapping

from deq_lm.errors import ConfigError, UnusedSettingWarning
from deq_lm.structure import build
from deq_lm.training.recipe import Recipe, apply_override, load_recipe, recipe_text


@pytest.fixture(scope="module")
def mapping(tmp_path_factory) -> dict[str, Any]:
    return recipe_mapping(tmp_path_factory.mktemp("recipe"))


@pytest.fixture
def path(mapping, tmp_path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(mapping), encoding="utf-8")
    return file


def test_a_recipe_reads_back_from_its_own_text(path, tmp_path):
    recipe = load_recipe(path, ["training.optimizer.lr=1.0e-5", "name='ü: no'"])
    (tmp_path / "copy.yaml").write_text(recipe_text(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "copy.yaml") == recipe
    assert recipe.name == "ü: no"


def test_overrides_replace_single_values_lists_and_sections(path):
    recipe = load_recipe(
        path,
        [
            "training.max_steps=6",
            "training.optimizer.betas=[0.8, 0.9]",
            "training.phases=[]",
            "training.output_dir=some/run",
            "model.cell.d_model=64",
            "seed=7",
        ],
    )
    assert recipe.training.max_steps == 6
    assert recipe.training.optimizer.betas == (0.8, 0.9)
    assert recipe.training.phases == ()
    assert recipe.training.output_dir == "some/run"
    assert recipe.model["cell"]["d_model"] == 64
    assert recipe.seed == 7


def test_an_override_reaches_into_a_section_that_was_null(mapping):
    changed = {**mapping, "training": {**mapping["training"], "jacobian": None}}
    growth = ("growth.first_step=0", "growth.every_steps=2", "growth.increase=0.25", "growth.max_weight=null")
    for setting in ("weight=0.5", "probability=1.0", *growth):
        apply_override(changed, f"training.jacobian.{setting}")
    assert build(Recipe, changed).training.jacobian.weight_at(5) == 1.0


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.max_step=3", "recipe.training.max_step: unknown key; did you mean max_steps?"),
        ("trainin.max_steps=3", "recipe.trainin: unknown key; did you mean training?"),
        ("model.depht=unrolled", "model.depht: unknown key; did you mean depth?"),
        ("training.optimizer.lr=1e-3", "write 1.0e-3"),
        ("training.max_steps=many", "recipe.training.max_steps: expected a whole number"),
        ("training.max_steps=", "recipe.training.max_steps: expected a whole number"),
        ("training.max_steps", "expected section.key=value"),
        ("=3", "expected section.key=value"),
        ("training..max_steps=3", "expected section.key=value"),
        ("seed.x=3", "seed is a value, not a section"),
        ("seed=[1", "override seed:"),
        ("seed=-1", "seed=-1"),
        ("training.max_steps=0", "max_steps=0: expected at least 1"),
        ("training.max_steps=9", "schedule.decay_steps=8: expected at least max_steps=9"),
        ("training.clip_norm=0", "clip_norm=0.0"),
        ("training.output_dir=' '", "output_dir is empty"),
        ("training.jacobian.weight=0.0", "recipe.training.jacobian: weight=0.0"),
        ("training.jacobian.probability=2.0", "recipe.training.jacobian: probability=2.0"),
        ("training.faults.not_finite=ignore", "'ignore' is not allowed"),
        ("training.faults.unconverged_adjoint.policy=stop", "'stop' is not allowed"),
        ("training.faults.unconverged_adjoint.limit=0", "recipe.training.faults.unconverged_adjoint: limit=0.0"),
        ("training.faults.unconverged_adjoint=null", "recipe.training.faults.unconverged_adjoint: expected a section"),
        (
            "model.adjoint={name: implicit, stopping: {rtol: 0.2}}",
            "training.faults.unconverged_adjoint.limit=0.1: expected at least the rtol of the stopping rule, 0.2",
        ),
        (
            "model.stopping.rtol=0.6",
            "training.faults.unconverged_solve.limit=0.5: expected at least the rtol of the stopping rule, 0.6",
        ),
        ("training.mixed_precision=fp16", "Valid here: bf16"),
        ("training.evaluate_every=0", "evaluate_every=0"),
    ],
)
def test_a_wrong_override_is_refused_in_one_line(path, override, words):
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, [override])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_policy_about_solves_says_that_a_model_without_any_has_no_use_for_it(path):
    for override in ("model.adjoint.name=phantom", "model.adjoint.name=jacobian_free"):
        with pytest.warns(UnusedSettingWarning, match=r"unconverged_adjoint\.policy=warn\. Give ignore"):
            load_recipe(path, [override])
        load_recipe(path, [override, "training.faults.unconverged_adjoint.policy=ignore"])
    unrolled = ["model.depth=unrolled", "model.num_layers=2", "model.stopping={}"]
    ignored = [f"training.faults.unconverged_{solve}.policy=ignore" for solve in ("solve", "adjoint")]
    for name, other in (ignored, ignored[::-1]):
        with pytest.warns(UnusedSettingWarning, match="no effect in a run without such a solve"):
            load_recipe(path, [*unrolled, name, other.replace("ignore", "warn")])
    load_recipe(path, [*unrolled, *ignored])
