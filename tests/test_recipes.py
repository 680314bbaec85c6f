"""The recipes that come with the project: valid, complete, and listed."""

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from deq_lm.modeling import build_config
from deq_lm.modeling.configuration_deq_lm import ModelSettings
from deq_lm.structure import build, to_mapping
from deq_lm.training.phases import PhaseConfig
from deq_lm.training.recipe import load_recipe
from deq_lm.training.strict_yaml import read_yaml

FOLDER = Path(__file__).resolve().parents[1] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))


def places(mapping: Mapping[str, Any], prefix: str = "") -> set[str]:
    """The dotted names of all settings, as far down as sections go."""
    found = set()
    for key, value in mapping.items():
        found |= places(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key}
    return found


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_is_valid_and_leaves_no_setting_to_a_default(path):
    recipe = load_recipe(path)
    config = build_config(recipe.model, vocab_size=300_000)  # with every default filled in
    complete = {
        **to_mapping(recipe),
        "model": {field.name: getattr(config, field.name) for field in fields(ModelSettings)},
    }
    assert places(complete) - places(read_yaml(path)) == set()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_is_named_after_its_file_and_writes_to_a_folder_of_that_name(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert recipe.training.output_dir == f"runs/{path.stem}"


def test_every_recipe_is_listed():
    listing = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in RECIPES if f"`{path.name}`" not in listing] == []


def test_the_sections_the_readme_shows_are_valid():
    blocks = re.findall(r"```yaml\n(.*?)```", (FOLDER / "README.md").read_text("utf-8"), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        section = yaml.safe_load(block)
        for phase in section.pop("phases", []):
            build(PhaseConfig, phase, "phases")
        config = build_config({"cell": {"name": "transformer_xl", "d_model": 64}, **section}, vocab_size=267_735)
        assert places({name: getattr(config, name) for name in section}) == places(section)  # complete, too
