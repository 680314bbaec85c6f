"""One step, and the run around it."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny_run import PLAIN, forward_changed, leave_weights_alone, make_recipe, make_state, metrics, not_finite, one_step
from transformers import AutoTokenizer

from deq_lm.errors import CheckpointError, ConfigError, DataError
from deq_lm.evaluation import EvaluationResult, read_record
from deq_lm.evaluation.model_card import model_card
from deq_lm.modeling import DEQLMForCausalLM
from deq_lm.training import loop
from deq_lm.training.faults import MAX_SKIPPED_IN_A_ROW
from deq_lm.training.loop import train
from deq_lm.training.recipe import load_recipe


def test_the_gradient_is_of_all_nats_over_all_targets(tmp_path):
    recipe = make_recipe(tmp_path, *PLAIN, "training.jacobian=null")
    accelerator = Accelerator()
    state, *_ = make_state(recipe, accelerator)
    other, *_ = make_state(recipe, accelerator)
    for s in (state, other):
        s.model.double()
    leave_weights_alone(state)
    result = one_step(recipe, state, accelerator)

    first, second = other.streams.next_segment(), other.streams.next_segment()
    output = other.model(first.input_ids, targets=first.targets)
    nats = output.nll_nats + other.model(second.input_ids, targets=second.targets, memory=output.memory).nll_nats
    (nats / 64).backward()  # 2 segments of 4 streams of 8 tokens
    squares = 0.0
    for ours, theirs in zip(state.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-12)
        squares += theirs.grad.square().sum().item()
    assert result.grad_norm == pytest.approx(squares**0.5, rel=1e-5)
    assert state.interval.nll_nats == pytest.approx(nats.item(), rel=1e-6)
    assert state.interval.num_targets == state.progress.num_tokens == 64


@pytest.mark.parametrize("power_iterations", ["null", "2"])
def test_the_jacobian_term_adds_its_weighted_gradient_averaged_over_the_segments(tmp_path, power_iterations):
    gradients = {}
    for weight in (0.1, 0.2, 0.3):
        recipe = make_recipe(
            tmp_path,
            *PLAIN,
            f"training.jacobian.weight={weight}",
            "training.jacobian.probability=1.0",
            f"training.jacobian.power_iterations={power_iterations}",
        )
        accelerator = Accelerator()
        state, *_ = make_state(recipe, accelerator)
        leave_weights_alone(state)
        torch.manual_seed(0)  # the same directions each time
        one_step(recipe, state, accelerator)
        gradients[weight] = torch.cat([parameter.grad.flatten().clone() for parameter in state.model.parameters()])
    first, second = gradients[0.2] - gradients[0.1], gradients[0.3] - gradients[0.2]
    assert first.norm() > 1e-4
    assert torch.dist(first, second) <= 1e-2 * first.norm()  # linear in the weight


def test_a_step_waits_for_the_device_once_besides_its_solves(tmp_path, monkeypatch):
    recipe = make_recipe(tmp_path, "training.phases=[]", "training.jacobian.probability=1.0")
    accelerator = Accelerator()
    state, *_ = make_state(recipe, accelerator)
    leave_weights_alone(state)
    waits = []

    def counted(name):
        method = getattr(torch.Tensor, name)

        def call(*args):
            frame, files = sys._getframe(1), []
            while frame is not None:
                files.append(frame.f_code.co_filename)
                frame = frame.f_back
            if not any("deq_lm/solvers" in file or "deq_lm/adjoints" in file for file in files):
                waits.append((name, files[0]))
            return method(*args)

        return call

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    result = one_step(recipe, state, accelerator)
    assert [name for name, _ in waits] == ["tolist"], waits
    assert result.faults == {}
    assert len(state.interval.solver_evaluations) == len(state.interval.adjoint_residuals) == 2 * 4


def test_the_gradient_is_clipped_to_the_given_norm(tmp_path):
    recipe = make_recipe(tmp_path, "training.clip_norm=1.0e-2")
    accelerator = Accelerator()
    state, *_ = make_state(recipe, accelerator)
    leave_weights_alone(state)
    result = one_step(recipe, state, accelerator)
    clipped = sum(parameter.grad.square().sum().item() for parameter in state.model.parameters()) ** 0.5
    assert result.grad_norm > 0.02
    assert clipped == pytest.approx(1e-2, rel=1e-3)


def test_memory_is_the_segment_before_of_the_same_streams_and_none_where_they_start(tmp_path):
    recipe = make_recipe(tmp_path, "training.gradient_accumulation=1", "training.batch_size=12")
    accelerator = Accelerator()
    state, *_ = make_state(recipe, accelerator)
    leave_weights_alone(state)  # then the embedding stays, so that remembered inputs can be recomputed
    passes = []
    with forward_changed(state.model, lambda output, kwargs: passes.append(kwargs)):
        input_ids = []
        forward = state.model.forward
        state.model.forward = lambda ids, **kwargs: (input_ids.append(ids), forward(ids, **kwargs))[1]
        while state.streams.state_dict()["epoch"] == 0:
            one_step(recipe, state, accelerator)
        one_step(recipe, state, accelerator)
    (again,) = [i for i, ids in enumerate(input_ids) if i > 0 and ids.equal(input_ids[0])]
    for i, kwargs in enumerate(passes):
        if i in (0, again):
            assert kwargs["memory"] is None
        else:
            remembered = state.model.model.embed_tokens(input_ids[i - 1]) * state.model.config.d_model**0.5
            assert kwargs["memory"].x.equal(remembered)  # mem_len is segment_length


def test_the_first_share_of_the_steps_is_shallow_and_the_rest_are_solves(tmp_path):
    recipe = make_recipe(tmp_path, "training.gradient_accumulation=1")  # fraction 0.25 of 8 steps
    accelerator = Accelerator()
    state, *_ = make_state(recipe, accelerator)
    seen = []
    with forward_changed(state.model, lambda output, kwargs: seen.append(kwargs["num_unrolled_steps"])):
        for _ in range(4):
            one_step(recipe, state, accelerator)
    assert seen == [2, 2, None, None]
    assert len(state.interval.solver_evaluations) == len(state.interval.adjoint_evaluations) == 2 * 4


def test_a_loss_that_is_not_finite_changes_no_weight_and_is_counted(tmp_path):
    recipe = make_recipe(tmp_path)
    accelerator = Accelerator()
    state, *_ = make_state(recipe, accelerator)
    for _ in range(3):
        one_step(recipe, state, accelerator)
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    lr = state.schedule.get_last_lr()
    with forward_changed(state.model, not_finite):
        result = one_step(recipe, state, accelerator)
    assert "not_finite" in result.faults
    assert all(tensor.equal(before[name]) for name, tensor in state.model.state_dict().items())
    assert state.memory is None
    assert state.schedule.get_last_lr() != lr  # the rate is a function of the step
    assert (state.progress.step, state.progress.account.num_skipped, state.progress.num_skipped_in_a_row) == (4, 1, 1)
    assert one_step(recipe, state, accelerator).faults == {}
    assert (state.progress.account.num_skipped, state.progress.num_skipped_in_a_row) == (1, 0)
    assert not any(tensor.isnan().any() for tensor in state.model.state_dict().values())


def test_a_gradient_that_is_not_finite_is_skipped_too(tmp_path):
    recipe = make_recipe(tmp_path)
    accelerator = Accelerator()
    state, *_ = make_state(recipe, accelerator)
    one_step(recipe, state, accelerator)
    weight = next(state.model.parameters())
    hook = weight.register_hook(lambda grad: grad * float("nan"))
    assert "not_finite" in one_step(recipe, state, accelerator).faults
    hook.remove()
    assert weight.isfinite().all()


def test_a_run_gives_up_after_too_many_skipped_steps_in_a_row(tmp_path, monkeypatch, capsys):
    recipe = make_recipe(tmp_path, "training.max_steps=40", "training.schedule.decay_steps=40")
    step = loop.train_step

    def step_then_fail(accelerator, model, state, *args, **kwargs):
        if state.progress.step < 3:
            return step(accelerator, model, state, *args, **kwargs)
        with forward_changed(model, not_finite):
            return step(accelerator, model, state, *args, **kwargs)

    monkeypatch.setattr(loop, "train_step", step_then_fail)
    with pytest.raises(FloatingPointError, match=rf"step {3 + MAX_SKIPPED_IN_A_ROW}: .*training\.optimizer\.lr"):
        train(recipe)
    assert capsys.readouterr().out.count("update skipped") == MAX_SKIPPED_IN_A_ROW
    lines = metrics(recipe, "train")
    assert [line["skipped"] for line in lines] == [0] * 3 + [1] * (MAX_SKIPPED_IN_A_ROW - 1)
    assert lines[-1]["loss"] is None


def test_a_run_folder_holds_the_run(tmp_path):
    recipe = make_recipe(tmp_path, "training.track=true")
    train(recipe)
    run = Path(recipe.training.output_dir)
    assert {path.name for path in run.iterdir()} == {
        "recipe.yaml",
        "versions.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "final",
        "lock",
    }
    assert load_recipe(run / "recipe.yaml") == recipe
    (start,) = json.loads((run / "versions.json").read_text())
    assert start["step"] == 0
    assert start["torch"] == torch.__version__
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000006", "step_00000008"]
    assert len(list((run / "tensorboard").iterdir())) == 1
    assert [line["step"] for line in metrics(recipe, "train")] == list(range(1, 9))
    assert [line["step"] for line in metrics(recipe, "valid")] == [4, 8]
    # the final folder and every checkpoint are models as the library knows them
    for folder in (run / "final", run / "checkpoints" / "step_00000008"):
        model = DEQLMForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert len(tokenizer) == model.config.vocab_size


def test_the_step_of_the_lowest_validation_loss_leaves_a_checkpoint(tmp_path, monkeypatch):
    recipe = make_recipe(tmp_path, "training.evaluate_every=3", "training.checkpoint_every=100", "training.max_steps=8")
    measure, losses = loop.evaluate_perplexity, iter([2.0, 3.0])

    def lowest_at_three(*args):
        result = measure(*args)
        nll_nats = result.perplexity.num_tokens * next(losses)
        return replace(result, perplexity=replace(result.perplexity, nll_nats=nll_nats))

    monkeypatch.setattr(loop, "evaluate_perplexity", lowest_at_three)
    train(recipe)
    checkpoints = Path(recipe.training.output_dir) / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_00000003", "step_00000008"]
    state = json.loads((checkpoints / "step_00000008" / "state.json").read_text())
    assert (state["progress"]["best_step"], state["progress"]["best_nats_per_token"]) == (3, 2.0)


def test_a_folder_with_files_in_it_is_not_overwritten(tmp_path):
    recipe = make_recipe(tmp_path)
    run = Path(recipe.training.output_dir)
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="never overwritten; continue it with --resume"):
        train(recipe)
    with pytest.raises(CheckpointError, match=r"no recipe\.yaml, so it is no run"):
        train(recipe, resume=True)
    assert [path.name for path in run.iterdir()] == ["notes.txt"]
    (run / "notes.txt").unlink()
    run.rmdir()
    run.write_text("a file")
    with pytest.raises(CheckpointError, match="is a file"):
        train(recipe)


def test_a_corpus_shorter_than_one_segment_leaves_no_run_folder(tmp_path):
    recipe = make_recipe(tmp_path, "training.segment_length=100000")
    with pytest.raises(DataError):
        train(recipe)
    assert not Path(recipe.training.output_dir).exists()


@pytest.mark.parametrize("kind", ["fp16", "fp8"])
def test_mixed_precision_that_needs_a_scaled_loss_is_refused_before_anything_is_written(tmp_path, monkeypatch, kind):
    recipe = make_recipe(tmp_path)
    monkeypatch.setattr(loop, "Accelerator", lambda **_: SimpleNamespace(mixed_precision=kind))
    with pytest.raises(ConfigError, match=rf"mixed precision {kind}.*expected no or bf16.*--mixed_precision bf16"):
        train(recipe)
    assert not Path(recipe.training.output_dir).exists()


def test_mixed_precision_of_the_launcher_is_looked_at(tmp_path, monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    try:
        with pytest.raises(ConfigError, match="mixed precision fp16"):
            train(make_recipe(tmp_path))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    ("rtol", "adjoint_rtol", "warned"),
    [
        ("1.0e-3", "1.0e-3", ["model.stopping"]),
        ("1.0e-2", "1.0e-3", []),
        ("1.0e-2", "1.0e-4", ["model.adjoint.stopping"]),
    ],
)
def test_a_tolerance_below_the_floor_of_bfloat16_is_warned_of_and_what_stalls_there_is_counted(
    tmp_path, caplog, rtol, adjoint_rtol, warned
):
    AcceleratorState._reset_state(reset_partial_state=True)
    recipe = make_recipe(
        tmp_path,
        "training.mixed_precision=bf16",
        "training.max_steps=3",
        "training.phases=[]",
        f"model.stopping={{max_steps: 60, rtol: {rtol}}}",
        f"model.adjoint={{name: implicit, stopping: {{max_steps: 60, rtol: {adjoint_rtol}}}}}",
    )
    try:
        train(recipe)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert re.findall(r"(model\S*)\.rtol=.* solves will stall", caplog.text) == warned
    for line in metrics(recipe, "train"):
        assert (line["solver_share_stalled"] > 0.25) == ("model.stopping" in warned)
        assert (line["adjoint_share_stalled"] > 0.25) == ("model.adjoint.stopping" in warned)


def test_bfloat16_autocast_trains_float32_weights(tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    recipe = make_recipe(tmp_path, "training.mixed_precision=bf16", "training.max_steps=4", "training.phases=[]")
    try:
        train(recipe)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    losses = [line["loss"] for line in metrics(recipe, "train")]
    assert losses[-1] < losses[0]
    model = DEQLMForCausalLM.from_pretrained(Path(recipe.training.output_dir) / "final")
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_each_validation_of_an_equilibrium_logs_its_contraction_and_what_it_writes_and_changes_no_later_step(tmp_path):
    sampling = make_recipe(tmp_path / "a", "training.max_steps=4", "evaluation.validation_sample_tokens=5")
    silent = make_recipe(tmp_path / "b", "training.max_steps=4", "training.evaluate_every=null")
    for recipe in (sampling, silent):
        train(recipe)
    (valid,), (sample,) = metrics(sampling, "valid"), metrics(sampling, "sample")
    assert valid["spectral_radius"] > 0
    assert (sample["step"], bool(sample["text"])) == (4, True)
    assert metrics(silent, "sample") == []
    losses = [[line["loss"] for line in metrics(recipe, "train")] for recipe in (sampling, silent)]
    assert losses[0] == losses[1]
    weights = [DEQLMForCausalLM.from_pretrained(f"{r.training.output_dir}/final") for r in (sampling, silent)]
    for ours, theirs in zip(weights[0].parameters(), weights[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_model_card_in_the_exported_folder_is_that_of_the_evaluation_beside_it(tmp_path):
    recipe = make_recipe(tmp_path, "training.max_steps=2")
    train(recipe)
    final = Path(recipe.training.output_dir) / "final"
    result = read_record(final / "evaluation.json", EvaluationResult)
    assert (final / "README.md").read_text("utf-8") == str(model_card(result))
    (code,) = re.findall(r"```python\n(.*?)```", (final / "README.md").read_text("utf-8"), flags=re.DOTALL)
    names = {}
    exec(compile(code.replace("FOLDER", str(final)), "README.md", "exec"), names)
    assert isinstance(names["model"], DEQLMForCausalLM)
    assert len(names["tokenizer"]) == names["model"].config.vocab_size
