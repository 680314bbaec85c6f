"""Distillation: the term and its gradient, a teacher with its own memory, and a run that resumes bit for bit."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from processes import launch
from safetensors.torch import load_file, save_file
from tiny_run import PLAIN, leave_weights_alone, make_recipe, make_state, metrics, one_step

from deq_lm.errors import CheckpointError, ConfigError, UnusedSettingWarning
from deq_lm.evaluation.loading import load_model
from deq_lm.training.distillation import load_teacher, soft_cross_entropy
from deq_lm.training.loop import train
from deq_lm.training.step import train_step

TWIN = ("model.depth=unrolled", "model.num_layers=3", "model.stopping={}", "training.jacobian=null")
QUIET = ("training.faults.unconverged_adjoint.policy=ignore", "training.evaluate_every=null", "training.max_steps=2")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """The run folder of an unrolled twin, on the text that every tiny run has."""
    folder = tmp_path_factory.mktemp("teacher")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        recipe = make_recipe(folder, *TWIN, *QUIET, "seed=5")
        train(recipe)
    return Path(recipe.training.output_dir)


def taught(teacher: Path, *, weight: float | str = 0.5, temperature: float = 2.0, until: float = 1.0) -> str:
    return f"training.distillation={{teacher: {teacher}, weight: {weight}, temperature: {temperature}, until: {until}}}"


def test_the_term_is_the_cross_entropy_of_the_softened_predictions_with_a_gradient_free_of_the_temperature():
    draw = torch.Generator().manual_seed(0)
    student, own = (torch.randn(2, 3, 7, dtype=torch.float64, generator=draw) for _ in range(2))
    student.requires_grad_()
    value = soft_cross_entropy(student, own, 2.0)
    by_hand = 0.0
    for row, other in zip(student.flatten(0, 1) / 2, own.flatten(0, 1) / 2, strict=True):
        p, q = other.exp() / other.exp().sum(), row.exp() / row.exp().sum()
        by_hand = by_hand - 4 * (p * q.log()).sum()
    torch.testing.assert_close(value, by_hand)
    (at_the_teacher,) = torch.autograd.grad(soft_cross_entropy(own.requires_grad_(), own.detach(), 2.0), own)
    torch.testing.assert_close(at_the_teacher, torch.zeros_like(own), rtol=0, atol=1e-12)
    # of a hot softmax, Hinton et al.'s equation 4: the mean-free differences of the logits by the number of words
    hot = torch.autograd.grad(soft_cross_entropy(student, own.detach(), 1e4), student)[0]
    difference = student.detach() - own.detach()
    expected = (difference - difference.mean(dim=-1, keepdim=True)) / 7
    torch.testing.assert_close(hot, expected, rtol=1e-3, atol=1e-5)


def test_a_step_adds_the_gradient_of_the_term_by_a_teacher_that_remembers(tmp_path, teacher):
    recipe = make_recipe(tmp_path, *PLAIN, "training.jacobian=null", taught(teacher))
    accelerator = Accelerator()
    state, *_ = make_state(recipe, accelerator)
    other, *_ = make_state(make_recipe(tmp_path, *PLAIN, "training.jacobian=null"), accelerator)
    model, _ = load_model(teacher / "final")
    leave_weights_alone(state)
    one_step(recipe, state, accelerator)

    memory, own_memory, loss = None, None, torch.zeros(())
    for _ in range(2):
        segment = other.streams.next_segment()
        output = other.model(segment.input_ids, targets=segment.targets, memory=memory)
        with torch.no_grad():
            own = model(segment.input_ids, memory=own_memory)
        memory, own_memory = output.memory, own.memory
        loss = loss + output.nll_nats + 0.5 * soft_cross_entropy(output.logits, own.logits, 2.0)
    (loss / 64).backward()  # 2 segments of 4 streams of 8 tokens
    assert not torch.equal(own_memory.z, torch.zeros_like(own_memory.z))
    torch.testing.assert_close(state.teacher_memory.z, own_memory.z)
    for ours, theirs in zip(state.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-9)
    assert state.interval.nll_nats == pytest.approx(  # what is logged is of the text alone
        (loss.item() - 0.5 * soft_value(other, model)), rel=1e-5
    )


def soft_value(state, model) -> float:
    """The sum of the terms of the first two segments."""
    state.streams.load_state_dict({"epoch": 0, "segment": 0})
    memory, own_memory, total = None, None, 0.0
    with torch.no_grad():
        for _ in range(2):
            segment = state.streams.next_segment()
            output, own = state.model(segment.input_ids, memory=memory), model(segment.input_ids, memory=own_memory)
            memory, own_memory = output.memory, own.memory
            total += soft_cross_entropy(output.logits, own.logits, 2.0).item()
    return total


def test_the_teacher_is_frozen_in_evaluation_mode_and_asked_until_its_share_of_the_steps(tmp_path, teacher):
    recipe = make_recipe(tmp_path, taught(teacher, until=0.375))  # 3 of 8 steps
    accelerator = Accelerator()
    state, *_ = make_state(recipe, accelerator)
    model = state.teacher.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []
    model.register_forward_hook(
        lambda module, *_: seen.append((state.progress.step, module.training, torch.is_grad_enabled()))
    )
    for _ in range(4):
        one_step(recipe, state, accelerator)
    assert seen == [(step, False, False) for step in (0, 0, 1, 1, 2, 2)]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert state.teacher is state.teacher_memory is None  # nor on the device and in checkpoints any longer


def test_a_student_comes_closer_to_its_teacher_than_without_it(tmp_path, teacher):
    model, _ = load_model(teacher / "final")
    distances = []
    for name, extra in (("alone", ()), ("taught", (taught(teacher, weight=10.0, temperature=1.0),))):
        recipe = make_recipe(tmp_path, "training.phases=[]", "training.jacobian=null", *extra)
        accelerator = Accelerator()
        state, *_ = make_state(recipe, accelerator)
        for _ in range(8):
            one_step(recipe, state, accelerator)
        ids = state.streams.next_segment().input_ids
        state.model.eval()
        with torch.no_grad():
            own = model(ids).logits
            distances.append(
                (soft_cross_entropy(state.model(ids).logits, own, 1.0) - soft_cross_entropy(own, own, 1.0)).item()
            )
        assert (state.teacher is None) == (name == "alone")
    assert distances[1] < 0.9 * distances[0]


@pytest.mark.parametrize("until", [1.0, 0.25])
def test_a_distilled_run_that_is_resumed_is_the_one_that_was_not_bit_for_bit(tmp_path, teacher, until):
    short = (taught(teacher, until=until), "training.evaluate_every=null", "training.max_steps=4")
    whole, again = (f"training.output_dir={tmp_path / name}" for name in ("whole", "again"))
    train(make_recipe(tmp_path, *short, whole))
    train(make_recipe(tmp_path, *short, again, "training.max_steps=2"))
    moved = tmp_path / "moved"
    moved.symlink_to(teacher)  # known by its weights, not by its place
    resumed = make_recipe(tmp_path, *short[1:], again, taught(moved, until=until))
    train(resumed, resume=True)
    folders = [tmp_path / name / "checkpoints" / "step_00000004" for name in ("whole", "again")]
    for name in ("model.safetensors", "rank_00000.safetensors", "optimizer.pt"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    kept = [name for name in load_file(folders[0] / "rank_00000.safetensors") if name.startswith("teacher_memory")]
    assert bool(kept) == (until == 1.0)


def test_another_teacher_at_the_same_place_is_refused_on_resuming(tmp_path, teacher):
    place = tmp_path / "place"
    place.mkdir()
    for file in (teacher / "final").iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    recipe = make_recipe(tmp_path, taught(place), *QUIET)
    train(recipe)
    weights = {name: value * 1.01 for name, value in load_file(place / "model.safetensors").items()}
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="teacher_sha256"):
        train(recipe, resume=True)


def test_a_longer_schedule_that_would_move_the_end_of_the_teaching_is_refused(tmp_path, teacher):
    short = (*QUIET, "training.schedule.decay_steps=null", "training.phases=[]")
    train(make_recipe(tmp_path, taught(teacher, until=0.5), *short))  # 1 of 2 steps
    longer = (*short, "training.max_steps=4")
    with pytest.raises(CheckpointError, match="num_taught_steps: 1 there, 2 here"):
        train(make_recipe(tmp_path, taught(teacher, until=0.5), *longer), resume=True)
    assert train(make_recipe(tmp_path, taught(teacher, until=0.25), *longer), resume=True) is None


def test_a_teacher_of_another_vocabulary_is_refused_before_anything_is_written(tmp_path, teacher):
    recipe = make_recipe(tmp_path, taught(teacher), "data.vocab_size=290")
    with pytest.raises(ConfigError, match=r"distillation\.teacher=.*another vocabulary, of 300 .* this run has 290"):
        train(recipe)
    assert not Path(recipe.training.output_dir).exists()
    fitting = make_recipe(
        tmp_path, taught(teacher), f"data.tokenizer={teacher / 'final'}", "data.vocab_size=null", *QUIET
    )
    assert train(fitting) is None


def test_a_teacher_that_is_not_there_is_one_line(tmp_path, teacher):
    recipe = make_recipe(tmp_path, taught(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"training\.distillation\.teacher=.*nowhere: .*no such folder") as caught:
        train(recipe)
    assert "\n" not in str(caught.value)


def gradient(folder: Path, overrides: tuple[str, ...]) -> None:
    """Save this process's gradient of the second of two steps: the teacher remembers its own streams."""
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(1)
    accelerator = Accelerator()
    recipe = make_recipe(folder, *overrides)
    state, *_ = make_state(recipe, accelerator)
    state.model.double()
    state.teacher.model.double()
    model = accelerator.prepare(state.model)
    leave_weights_alone(state)
    for _ in range(2):
        state.model.zero_grad()
        train_step(accelerator, model, state, recipe, stop_requested=False)
    grads = {name: parameter.grad for name, parameter in state.model.named_parameters()}
    torch.save(grads, folder / f"{accelerator.num_processes}_{accelerator.process_index}.pt")


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_two_processes_give_the_distilled_gradient_of_one(tmp_path, teacher):
    overrides = (*PLAIN, "training.jacobian=null", taught(teacher))
    gradient(tmp_path, overrides)
    launch(gradient, tmp_path, overrides)
    one = torch.load(tmp_path / "1_0.pt")
    for rank in (0, 1):
        for name, value in torch.load(tmp_path / f"2_{rank}.pt").items():
            torch.testing.assert_close(value, one[name], rtol=1e-6, atol=1e-12, msg=f"{name} on rank {rank}")


def test_the_teacher_is_loaded_without_changing_what_the_run_draws(tmp_path, teacher):
    losses = []
    for extra in ((), (taught(teacher, weight="1.0e-30"),)):
        recipe = make_recipe(tmp_path, *extra, *QUIET, f"training.output_dir={tmp_path / str(len(extra))}")
        train(recipe)
        losses.append([line["loss"] for line in metrics(recipe, "train")])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.distillation.weight=0.0", "weight=0.0: expected more than 0, or null"),
        ("training.distillation.temperature=0.0", "temperature=0.0: expected more than 0"),
        ("training.distillation.until=1.5", "until=1.5: expected a share of the steps"),
        ("training.distillation.teacher=' '", "teacher is empty"),
        ("training.distillation.student=x", "student: unknown key"),
    ],
)
def test_a_wrong_setting_is_refused_at_its_place(tmp_path, override, words):
    with pytest.raises(ConfigError, match=r"recipe\.training\.distillation") as caught:
        make_recipe(tmp_path, taught(Path("runs/x")), override)
    assert words in str(caught.value)


def test_a_share_of_less_than_a_step_has_no_effect_and_warns(tmp_path):
    with pytest.warns(UnusedSettingWarning, match=r"distillation\.until=0\.01 of 8 steps is none"):
        make_recipe(tmp_path, taught(Path("runs/x"), until=0.01))


def test_without_a_section_there_is_no_teacher():
    assert load_teacher(None, None, torch.device("cpu")) is None
