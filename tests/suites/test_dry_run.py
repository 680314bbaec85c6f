"""A dry run says what a run would take, and leaves nothing behind."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from tiny_run import make_recipe

from deq_lm.errors import ConfigError
from deq_lm.modeling import build_config, count_parameters
from deq_lm.suites import Subject, dry_run
from deq_lm.suites.memory import MemoryParts, parts_of_a_step
from deq_lm.suites.training_step import RepeatedStep, steady, with_budget
from deq_lm.training.run_folder import RunFolder


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def number(text: str, label: str) -> float:
    (found,) = re.findall(rf"^  {label} +([\d,.]+)$", text, flags=re.MULTILINE)
    return float(found.replace(",", ""))


def test_its_memory_is_about_that_of_the_whole_step_though_it_takes_a_few_streams(tmp_path):
    recipe = make_recipe(tmp_path, "training.batch_size=16", "model.cell.d_model=64", "model.cell.d_inner=128")
    text = dry_run(recipe)
    whole = with_budget(steady(recipe, regularize=True), 7)
    whole = replace(whole, training=replace(whole.training, gradient_accumulation=1))
    model = Subject("whole", whole, RunFolder(tmp_path)).untrained(torch.device("cpu"))
    parts = parts_of_a_step(RepeatedStep(whole, model, torch.arange(16 * 8 * 4 + 1).numpy() % 300))
    for field in fields(MemoryParts):
        megabytes = getattr(parts, field.name) / 1e6
        if field.name != "rest":
            assert number(text, field.name.replace("_", " ")) == pytest.approx(megabytes, rel=0.15, abs=0.06), (
                field.name
            )
        else:  # an upper estimate
            assert megabytes - 0.06 < number(text, "rest") < 2 * megabytes
    assert "4 of 16 streams, multiplied" in text
    assert "every forward solve takes 7 evaluations" in text
    assert "all of them regularized" in text


def test_its_parameters_are_all_parameters_and_its_time_is_that_of_all_steps(tmp_path, monkeypatch):
    recipe = make_recipe(tmp_path, "training.batch_size=8", "training.gradient_accumulation=3")
    monkeypatch.setitem(dry_run.__globals__, "_seconds", lambda step, device: 30.0)
    text = dry_run(recipe)
    (total,) = re.findall(r"^  together +([\d,]+)$", text, flags=re.MULTILINE)
    assert total == f"{count_parameters(build_config(recipe.model, 300)).total:,}"
    # 30 s for 4 streams and one segment: 180 s for 8 and three; 8 steps
    assert "time: 180.00 s a step of 192 tokens, 0 h 24 min for 8 steps" in text


def test_layers_of_a_stack_are_counted_together(tmp_path):
    recipe = make_recipe(
        tmp_path,
        "model.depth=stack",
        "model.num_layers=3",
        "model.stopping={}",
        "model.cell.injection=none",
        "training.phases=[]",
        "training.jacobian=null",
        "training.faults.unconverged_adjoint.policy=ignore",
    )
    text = dry_run(recipe)
    assert re.search(r"layers\.cells\.\*\.qkv\.weight +3 x 48 x 16 +2,304\n", text)
    assert "forward solve" not in text


def test_a_vocabulary_that_the_text_decides_has_to_be_given(tmp_path):
    recipe = make_recipe(tmp_path, "data.tokenizer=word_level", "data.vocab_size=null")
    with pytest.raises(ConfigError, match=r"a dry run does not\. Give data\.vocab_size=NUMBER"):
        dry_run(recipe)


def test_it_is_of_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process"):
        dry_run(make_recipe(tmp_path))


def test_it_writes_nothing(tmp_path):
    recipe = make_recipe(tmp_path)  # which writes its text
    before = sorted(Path(tmp_path).rglob("*"))
    dry_run(recipe)
    assert sorted(Path(tmp_path).rglob("*")) == before
