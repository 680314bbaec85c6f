"""The recipes that come with the project: valid, complete, and listed."""

import json
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.state import AcceleratorState
from tiny_run import metrics, write_corpus

from deq_lm.modeling import ParameterCount, build_config, count_parameters
from deq_lm.modeling.configuration_deq_lm import ModelSettings
from deq_lm.structure import build, to_mapping
from deq_lm.training import train
from deq_lm.training.distillation import DistillationConfig
from deq_lm.training.phases import JacobianConfig, PhaseConfig
from deq_lm.training.recipe import Recipe, load_recipe
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


PUBLISHED = {  # parameters in all and outside the embedding, in millions
    "wikitext103_deq_small": (138, 4.5),
    "wikitext103_deq_medium": (172, 43),
    "wikitext103_deq_medium_adaptive": (98, 70),
    "wikitext103_deq_jacreg_postln": (98, 70),
    "wikitext103_deq_jacreg_preln": (98, 70),
    "wikitext103_unrolled_tied": (138, 4.5),
    "wikitext103_unrolled_untied": (138, 4.5),
    "wikitext103_transformer_xl_18": (98, 72),
}


def counted(recipe: Recipe) -> ParameterCount:
    assert recipe.data.vocab_size is not None
    return count_parameters(build_config(recipe.model, recipe.data.vocab_size))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_papers_models_have_the_papers_parameters(name: str):
    count, (total, other) = counted(load_recipe(FOLDER / f"{name}.yaml")), PUBLISHED[name]
    assert count.total == pytest.approx(total * 1e6, rel=0.02)
    assert count.other == pytest.approx(other * 1e6, rel=0.02)


RIVALS = {
    "demo_cpu": ("demo_cpu_unrolled", "demo_cpu_checkpointed", "demo_cpu_untied"),
    "wiki21m_deq": ("wiki21m_unrolled", "wiki21m_checkpointed", "wiki21m_untied"),
    "wikitext103_deq_small": ("wikitext103_unrolled_tied", "wikitext103_unrolled_untied"),
}


@pytest.mark.parametrize(("name", "rival"), [(name, rival) for name, rivals in RIVALS.items() for rival in rivals])
def test_rivals_have_the_same_text_budget_width_and_memory_and_as_many_parameters(name: str, rival: str):
    ours, theirs = load_recipe(FOLDER / f"{name}.yaml"), load_recipe(FOLDER / f"{rival}.yaml")
    assert (ours.data, ours.seed, ours.model["embedding"]) == (theirs.data, theirs.seed, theirs.model["embedding"])
    of_the_depth = {
        "output_dir": "runs/any",
        "phases": (),
        "max_steps_jitter": 0,
        "jacobian": None,
        "faults": None,
        "optimizer": None,
    }
    assert replace(ours.training, **of_the_depth) == replace(theirs.training, **of_the_depth)
    rates = [replace(recipe.training.optimizer, lr=1.0) for recipe in (ours, theirs)]  # each has the one that suits it
    assert rates[0] == rates[1]
    changed = {"recompute", "injection", "d_inner"} if theirs.model["depth"] == "stack" else {"recompute"}
    cells = [{k: v for k, v in r.model["cell"].items() if k not in changed} for r in (ours, theirs)]
    assert cells[0] == cells[1]
    a, b = counted(ours), counted(theirs)
    assert b.embedding == a.embedding
    assert b.total == pytest.approx(a.total, rel=0.005)
    assert b.other == pytest.approx(a.other, rel=0.005)


@pytest.mark.parametrize(
    ("name", "multiscale"), [("demo_cpu", "demo_cpu_multiscale"), ("wiki21m_deq", "wiki21m_multiscale")]
)
def test_a_multiscale_recipe_differs_in_the_cell_alone_and_has_as_many_parameters(name: str, multiscale: str):
    ours, theirs = load_recipe(FOLDER / f"{name}.yaml"), load_recipe(FOLDER / f"{multiscale}.yaml")
    same_folder = {"output_dir": "runs/any"}
    assert replace(ours.training, **same_folder) == replace(theirs.training, **same_folder)
    own = {"name", "d_inner", "coarse"}
    settings = [
        {**r.model, "cell": {k: v for k, v in r.model["cell"].items() if k not in own}, "data": r.data, "seed": r.seed}
        for r in (ours, theirs)
    ]
    assert settings[0] == settings[1]
    assert counted(theirs).other == pytest.approx(counted(ours).other, rel=0.01)
    assert counted(theirs).embedding == counted(ours).embedding


def gpu_hours(recipe: Recipe) -> float:
    """At 100 TFLOP/s: 2 FLOP a parameter and evaluation, twice that for its full gradient, once for a product with J^T; the
    shortlist of the adaptive softmax once, with its gradient.
    """
    model, training = recipe.model, recipe.training
    num_tokens = training.max_steps * training.batch_size * training.segment_length
    evaluations, products = model["stopping"]["max_steps"] + 1, model["adjoint"]["stopping"]["max_steps"] + 1
    again = 0 if model["cell"]["recompute"] == "none" else 1
    per_parameter = {
        "equilibrium": 2 * (evaluations + 1) + 2 * products * (1 + again) + 4,
        "unrolled": 6 * (model["num_layers"] or 0),
        "stack": 6,
    }[model["depth"]]
    shallow = training.phases[0].until if training.phases else 0.0  # two evaluations, differentiated
    cell = counted(recipe).other * (per_parameter * (1 - shallow) + 12 * shallow)
    head = 6 * model["embedding"]["cutoffs"][0] * model["cell"]["d_model"]
    return num_tokens * (cell + head) / 1e14 / 3600


def test_the_table_of_published_models_is_right():
    listing = (FOLDER / "README.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| `(wikitext103_\w+)\.yaml` \|.*\| ([\d.]+) \| ([\d.]+) \| .* \| ([\d.]+) \|$", listing, re.MULTILINE
    )
    assert {row[0] for row in rows} == {path.stem for path in RECIPES if path.stem.startswith("wikitext103")}
    for name, total, other, hours in rows:
        recipe = load_recipe(FOLDER / f"{name}.yaml")
        count = counted(recipe)
        assert (total, other) == (f"{count.total / 1e6:.1f}", f"{count.other / 1e6:.1f}"), name
        assert hours == f"{gpu_hours(recipe):.0f}", name


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_in_small_trains(path, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)  # the recipes differ in mixed precision
    cell = load_recipe(path).model["cell"]
    small = [
        "data.corpus=text",
        f"data.data_dir={write_corpus(tmp_path / 'text')}",
        f"data.cache_dir={tmp_path / 'cache'}",
        f"model.cell.d_model={4 * cell['num_heads']}",
        *(["model.cell.d_inner=16"] if "d_inner" in cell else []),
        "model.cell.mem_len=6",
        f"training.output_dir={tmp_path / 'run'}",
        "training.max_steps=2",
        "training.batch_size=2",
        "training.segment_length=6",
        "training.schedule.warmup_steps=1",
        "training.faults.unconverged_adjoint.policy=ignore",
        "training.log_every=1",
        "training.track=false",
        "evaluation.segment_length=6",
        "evaluation.batch_size=4",
        "evaluation.causality_cuts=1",
        "evaluation.no_op_segments=0",
        "evaluation.unroll_depths=[]",
        "evaluation.sample_tokens=0",
    ]
    if load_recipe(path).data.tokenizer == "word_level":
        small += ["data.vocab_size=50", "model.embedding.cutoffs=[20, 30]"]
    else:
        small += ["data.vocab_size=300"]
    phases = to_mapping(load_recipe(path).training)["phases"]
    for i, phase in enumerate(phases):
        phase["until"] = (i + 1) / (len(phases) + 1)  # a step of it, and one after it
    recipe = load_recipe(path, [*small, f"training.phases={json.dumps(phases)}"])
    assert len(phases) < 2
    assert train(recipe) is None
    losses = [record["loss"] for record in metrics(recipe, "train")]
    assert len(losses) == 2
    assert all(0 < loss < 10 for loss in losses)


def test_the_sections_the_readme_shows_are_valid():
    blocks = re.findall(r"```yaml\n(.*?)```", (FOLDER / "README.md").read_text("utf-8"), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        section = yaml.safe_load(block)
        for phase in section.pop("phases", []):
            build(PhaseConfig, phase, "phases")
        if "distillation" in section:
            build(DistillationConfig, section.pop("distillation"), "distillation")
        if "jacobian" in section:
            jacobian = build(JacobianConfig, section.pop("jacobian"), "jacobian")
            weights = [jacobian.weight_at(step) for step in (0, 20_000, 30_000, 40_000, 50_000)]
            assert weights == pytest.approx([0, 0, 1, 2, 2])
        config = build_config({"cell": {"name": "transformer_xl", "d_model": 64}, **section}, vocab_size=267_735)
        assert places({name: getattr(config, name) for name in section}) == places(section)  # complete, too
