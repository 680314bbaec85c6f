"""Finished runs of a tiny equilibrium and of the same cell unrolled, to be measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import yaml
from tiny_run import recipe_mapping

from deq_lm.structure import build
from deq_lm.suites import Subject
from deq_lm.training import Recipe, train
from deq_lm.training.recipe import apply_override
from deq_lm.training.run_folder import RunFolder

CPU = torch.device("cpu")
OVERRIDES: Mapping[str, list[str]] = {
    "equilibrium": ["model.cell.dropout=0.0", "training.gradient_accumulation=1"],
    "unrolled": [
        "model.cell.dropout=0.0",
        "training.gradient_accumulation=1",
        "model.depth=unrolled",
        "model.num_layers=3",
        "training.phases=[]",
        "training.jacobian=null",
        "training.faults.unconverged_adjoint.policy=ignore",
    ],
}


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture(scope="session")
def recipes(tmp_path_factory) -> dict[str, Path]:
    """A recipe file of each, in one folder with their text."""
    folder = tmp_path_factory.mktemp("suite")
    files = {}
    for name, overrides in OVERRIDES.items():
        mapping = recipe_mapping(folder)
        if name == "unrolled":
            del mapping["model"]["stopping"]
        for override in [*overrides, f"name={name}", f"training.output_dir={json.dumps(str(folder / f'{name}_1'))}"]:
            apply_override(mapping, override)
        files[name] = folder / f"{name}.yaml"
        files[name].write_text(yaml.safe_dump(mapping), encoding="utf-8")
    return files


@pytest.fixture(scope="session")
def subjects(recipes) -> list[Subject]:
    """The models, trained; their folders are not to be changed."""
    made = []
    for name, file in recipes.items():
        recipe = build(Recipe, yaml.safe_load(file.read_text("utf-8")))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ACCELERATE_USE_CPU", "true")
            assert train(recipe) is None
        made.append(Subject(name, recipe, RunFolder(Path(recipe.training.output_dir))))
    return made
