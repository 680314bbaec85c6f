"""Models on a GPU: what they compute and generate, what a step keeps in memory, runs and their checkpoints."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from tiny_model import VOCABULARY, make
from tiny_run import make_recipe, metrics, recipe_mapping
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from deq_lm import DEQLMForCausalLM
from deq_lm.evaluation import load_model
from deq_lm.structure import build
from deq_lm.suites import Subject
from deq_lm.suites.config import MemorySettings
from deq_lm.suites.memory import StepMemory, measure_memory
from deq_lm.training import Recipe
from deq_lm.training.random_state import random_state_of_all, try_random_state
from deq_lm.training.recipe import apply_override
from deq_lm.training.run_folder import RunFolder

DEVICE = torch.device("cuda")
CPU = torch.device("cpu")
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "train_lm.py"
COARSE = [{"ratio": 2, "d_model": 8, "num_heads": 2, "d_inner": 12}]
CELLS = {
    "transformer_xl": {},
    "two_blocks": {"num_blocks": 2},
    "gated": {"gate": "highway"},
    "multiscale": {"name": "multiscale", "injection": "residual", "coarse": COARSE},
}
every_cell = pytest.mark.parametrize("cell", CELLS)


def tokens(batch: int, length: int, *, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@every_cell
def test_two_segments_with_padding_are_those_of_the_cpu(cell: str):
    ids, mask = tokens(3, 20), torch.ones(3, 20, dtype=torch.int64)
    mask[1, :4] = 0
    logits = []
    for device in (CPU, DEVICE):
        model = make(cell=CELLS[cell]).to(device)
        with torch.no_grad():
            first = model(ids[:, :12].to(device), mask[:, :12].to(device))
            second = model(ids[:, 12:].to(device), memory=first.memory)
        logits.append(torch.cat([first.logits, second.logits], dim=1).cpu())
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-5)


@every_cell
def test_later_tokens_change_earlier_logits_by_no_more_than_rounding(cell: str):
    model = make(cell=CELLS[cell], dtype=torch.float32, stopping={"max_steps": 5, "rtol": 1e-4}).to(DEVICE)
    ids = tokens(2, 96)
    changed = torch.cat([ids[:, :50], tokens(2, 46, seed=1)], dim=1)
    with torch.no_grad():
        before, after = (model(given.to(DEVICE)).logits.log_softmax(dim=-1) for given in (ids, changed))
    assert (before - after)[:, :50].abs().max() < 1e-4
    assert (before - after)[:, 50:].abs().max() > 1e-2


@every_cell
def test_generation_with_a_cache_is_that_without(cell: str):
    model = make(cell=CELLS[cell]).to(DEVICE)
    prompt = tokens(2, 7).to(DEVICE)
    options = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": 16,
        "do_sample": False,
        "eos_token_id": None,
    }
    cached, anew = (
        model.generate(prompt, use_cache=use_cache, pad_token_id=0, **options) for use_cache in (True, False)
    )
    assert cached.device.type == DEVICE.type
    assert torch.equal(cached, anew)


WIDE = ["model.cell.d_model=32", "model.cell.d_inner=128", "model.cell.dropout=0.0", "training.segment_length=32"]
WIDE += ["training.jacobian=null", "training.phases=[]"]
UNROLLED = ["model.depth=unrolled", "model.num_layers=3", "training.faults.unconverged_adjoint.policy=ignore"]


def steps(tmp_path: Path, device: torch.device, *overrides: str) -> list[StepMemory]:
    """The memory of steps with 12 and 24 evaluations."""
    AcceleratorState._reset_state(reset_partial_state=True)
    mapping = recipe_mapping(tmp_path)
    if overrides:  # an unrolled model has no rule
        del mapping["model"]["stopping"]
    for override in [*WIDE, *overrides]:
        apply_override(mapping, override)
    recipe = build(Recipe, mapping)
    settings = MemorySettings(num_evaluations=(12, 24))
    with sdpa_kernel(SDPBackend.MATH):  # of which both devices keep the same
        return list(
            measure_memory("gpu", [Subject("tiny", recipe, RunFolder(tmp_path / "none"))], settings, device).rows
        )


def test_the_memory_of_a_step_is_that_of_the_cpu(tmp_path, monkeypatch):
    on_gpu = steps(tmp_path, DEVICE)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for ours, theirs in zip(on_gpu, steps(tmp_path, CPU), strict=True):
        assert ours.most_activations == pytest.approx(theirs.most_activations, rel=0.02)
        assert ours.most_solver <= 1.25 * theirs.most_solver  # products of many vectors at once, not one by one


def test_what_the_allocator_gives_grows_with_layers_and_not_with_evaluations(tmp_path):
    few, many = steps(tmp_path, DEVICE)
    few_layers, many_layers = steps(tmp_path, DEVICE, *UNROLLED)
    activations = many_layers.most_activations - few_layers.most_activations
    assert many.most_activations == few.most_activations
    assert many_layers.allocated - few_layers.allocated > 0.8 * activations
    assert many.allocated - few.allocated < 0.05 * activations  # a residual a step


def call(monkeypatch, *arguments: str) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(sys, "argv", ["train_lm.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert caught.value.code == 0


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """What the run of a recipe in `folder` has recorded of its steps."""
    return metrics(make_recipe(folder), "train")


def recipe_in(folder: Path) -> str:
    folder.mkdir()
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_mapping(folder)), encoding="utf-8")
    return str(path)


MEASURED = [
    "evaluation.causality_cuts=8",
    "evaluation.no_op_segments=1",
    "evaluation.curve_evaluations=[1, 4]",
    "evaluation.unroll_depths=[2, 4]",
    "evaluation.sample_tokens=5",
]


@pytest.mark.parametrize("precision", ["null", "bf16"])
def test_a_run_trains_and_reports(monkeypatch, tmp_path, precision):
    call(monkeypatch, recipe_in(tmp_path / "a"), f"training.mixed_precision={precision}", *MEASURED)
    lines = lines_of(tmp_path / "a")
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["device_peak_bytes"] > 0
    report = json.loads((tmp_path / "a" / "run" / "final" / "evaluation.json").read_text("utf-8"))
    assert len(report["environment"]["gpus"]) == torch.cuda.device_count() > 0
    assert report["precision"] == "float32"
    assert report["causality"]["max_change_nats"] < 1e-3
    assert report["memory"][1]["equilibrium_bytes"] == report["memory"][0]["equilibrium_bytes"]


def test_a_run_with_a_teacher_a_learned_start_and_a_spectral_penalty_trains(monkeypatch, tmp_path):
    call(monkeypatch, recipe_in(tmp_path / "teacher"))
    options = [
        f"training.distillation={{teacher: {tmp_path / 'teacher' / 'run'}, weight: 1.0, temperature: 2.0, until: 0.5}}",
        "training.jacobian={weight: 1.0e-3, probability: 1.0, growth: null, power_iterations: 2}",
        "model.start=linear",
    ]
    call(monkeypatch, recipe_in(tmp_path / "taught"), *options)
    lines = lines_of(tmp_path / "taught")
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["solver_residual"] < 1


def test_an_interrupted_run_goes_on_as_it_would_have_and_its_model_loads_on_a_cpu(monkeypatch, tmp_path):
    whole, parts = (recipe_in(tmp_path / name) for name in ("whole", "parts"))
    call(monkeypatch, whole)
    call(monkeypatch, parts, "training.max_steps=4")
    call(monkeypatch, parts, "--resume")
    losses = [[line["loss"] for line in lines_of(tmp_path / name)] for name in ("whole", "parts")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)  # a GPU sums gradients in no fixed order
    model, _ = load_model(tmp_path / "parts" / "run" / "final")
    assert isinstance(model, DEQLMForCausalLM)
    ids = tokens(2, 16)
    with torch.no_grad():
        on_cpu, on_gpu = (model.to(device)(ids.to(device)).logits.cpu() for device in (CPU, DEVICE))
    torch.testing.assert_close(on_gpu, on_cpu, rtol=0, atol=1e-2)  # the tolerance of its solves


def test_a_run_begun_on_a_gpu_goes_on_without(monkeypatch, tmp_path):
    recipe = recipe_in(tmp_path / "a")
    call(monkeypatch, recipe, "training.max_steps=4")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    call(monkeypatch, recipe, "--resume", "training.max_steps=6")
    assert len(lines_of(tmp_path / "a")) == 6


def test_a_damaged_random_state_is_found_before_anything_is_set():
    numbers, tensors = random_state_of_all()
    try_random_state(numbers, tensors)
    with pytest.raises(RuntimeError):
        try_random_state(numbers, {**tensors, "random.cuda": tensors["random.cuda"][:-1]})
