"""A run that was stopped and resumed is the run that was not stopped, bit for bit."""

import os
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_run import UNEQUAL, make_recipe, metrics, signal_at_call

from deq_lm.errors import CheckpointError, ConfigError
from deq_lm.evaluation import causality, token_loss
from deq_lm.training import loop
from deq_lm.training.checkpoint import damage
from deq_lm.training.loop import train


def assert_same_run(recipe, other) -> None:
    """Weights, optimizer, random state, memory and every number logged are equal, except times and memory."""
    last = f"checkpoints/step_{recipe.training.max_steps:08d}"
    folder, other_folder = (Path(r.training.output_dir) / last for r in (recipe, other))
    for name in ("model.safetensors", "rank_00000.safetensors"):
        tensors, others = load_file(folder / name), load_file(other_folder / name)
        assert tensors.keys() == others.keys()
        assert all(tensors[key].equal(others[key]) for key in tensors)
    assert (folder / "optimizer.pt").read_bytes() == (other_folder / "optimizer.pt").read_bytes()
    for kind in ("train", "valid", "test"):
        lines, other_lines = (
            [{key: value for key, value in line.items() if key not in UNEQUAL} for line in metrics(r, kind)]
            for r in (recipe, other)
        )
        if kind == "test":  # a run that was to stop earlier has measured the test split then, too
            lines, other_lines = lines[-1:], other_lines[-1:]
        assert lines == other_lines


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        recipe = make_recipe(tmp_path_factory.mktemp("whole"))
        assert train(recipe) is None
    return recipe


def test_four_steps_and_four_more_are_eight(uninterrupted, tmp_path):
    train(make_recipe(tmp_path, "training.max_steps=4"))
    recipe = make_recipe(tmp_path)
    train(recipe, resume=True)
    assert_same_run(uninterrupted, recipe)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_a_checkpoint_and_the_rest_follows_on_resume(
    uninterrupted, tmp_path, monkeypatch, number, capsys
):
    recipe = make_recipe(tmp_path, "training.log_every=3", "training.checkpoint_every=100")
    step = loop.train_step

    def step_then_signal(*args, **kwargs):
        if args[2].progress.step == 3:
            os.kill(os.getpid(), number)
        return step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", step_then_signal)
        assert train(recipe) == number
    folders = sorted((Path(recipe.training.output_dir) / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["step_00000004"]  # before the validation that is due then
    assert damage(folders[0]) is None
    assert "continue with --resume" in capsys.readouterr().out
    assert train(recipe, resume=True) is None
    whole = {line["step"]: line["loss"] for line in metrics(uninterrupted, "train")}
    resumed = metrics(recipe, "train")  # means over three steps, of which the checkpoint lies in the middle
    assert [line["step"] for line in resumed] == [3, 6]
    assert resumed[1]["loss"] == pytest.approx(sum(whole[step] for step in (4, 5, 6)) / 3, rel=1e-6)
    assert metrics(recipe, "valid") == metrics(uninterrupted, "valid")
    assert metrics(recipe, "test") == metrics(uninterrupted, "test")


def test_a_signal_during_a_save_is_obeyed_after_the_next_step(uninterrupted, tmp_path, monkeypatch):
    recipe = make_recipe(tmp_path)
    signal_at_call(monkeypatch, loop.checkpoint, "save", 1)
    assert train(recipe) == signal.SIGTERM
    assert damage(Path(recipe.training.output_dir) / "checkpoints" / "step_00000003") is None
    assert train(recipe, resume=True) is None
    assert_same_run(uninterrupted, recipe)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_signal_breaks_off_a_validation_which_is_made_on_resume(uninterrupted, tmp_path, monkeypatch, keep):
    recipe = make_recipe(tmp_path, f"training.keep_checkpoints={keep}")
    with monkeypatch.context() as patch:
        segments = signal_at_call(patch, token_loss, "without_padding", 3)
        assert train(recipe) == signal.SIGTERM
    assert len(segments) == 3  # of which the last is not scored
    newest = Path(recipe.training.output_dir) / "checkpoints" / "step_00000004"
    assert damage(newest) is None
    assert metrics(recipe, "valid") == []
    with monkeypatch.context() as patch:
        segments = signal_at_call(patch, token_loss, "without_padding", 2)
        assert train(recipe, resume=True) == signal.SIGTERM  # again, and nothing is lost
    assert len(segments) == 2
    assert train(recipe, resume=True) is None
    assert_same_run(uninterrupted, recipe)


@pytest.mark.parametrize(("place", "name"), [(token_loss, "without_padding"), (causality, "_log_probabilities")])
def test_a_signal_breaks_off_the_report_at_the_end_which_is_made_on_resume(
    uninterrupted, tmp_path, monkeypatch, capsys, place, name
):
    recipe = make_recipe(tmp_path, "training.evaluate_every=null")
    run = Path(recipe.training.output_dir)
    with monkeypatch.context() as patch:
        calls = signal_at_call(patch, place, name, 2)
        assert train(recipe) == signal.SIGTERM
    assert len(calls) == 2
    assert "continue with --resume" in capsys.readouterr().out
    assert metrics(recipe, "test") == []
    assert not (run / "final").exists()
    last = run / "checkpoints" / "step_00000008"
    before = {path: path.stat().st_mtime_ns for path in last.iterdir()}
    monkeypatch.setattr(loop, "train_step", None)  # no step is left
    assert train(recipe, resume=True) is None
    assert {path: path.stat().st_mtime_ns for path in last.iterdir()} == before
    assert metrics(recipe, "test") == metrics(uninterrupted, "test")
    assert metrics(recipe, "faults") == metrics(uninterrupted, "faults")  # one line
    assert (run / "final" / "evaluation.json").is_file()


def test_a_finished_run_that_is_resumed_makes_its_report_anew_and_records_it_once(uninterrupted, tmp_path):
    recipe = make_recipe(tmp_path)
    train(make_recipe(tmp_path, "training.max_steps=4"))
    for _ in range(2):
        train(recipe, resume=True)
        for kind in ("test", "faults"):
            at_4, at_8 = metrics(recipe, kind)  # of the run that was to stop earlier, and of this one
            assert at_4["step"] == 4
            assert [at_8] == metrics(uninterrupted, kind)


def test_what_a_signal_breaks_off_of_the_validation_of_the_last_step_is_made_on_resume_and_then_the_report(
    uninterrupted, tmp_path, monkeypatch
):
    recipe = make_recipe(tmp_path, "training.evaluate_every=8")
    with monkeypatch.context() as patch:
        segments = signal_at_call(patch, token_loss, "without_padding", 3)
        assert train(recipe) == signal.SIGTERM
    assert len(segments) == 3
    run = Path(recipe.training.output_dir)
    assert damage(run / "checkpoints" / "step_00000008") is None
    assert metrics(recipe, "valid") == metrics(recipe, "test") == metrics(recipe, "faults") == []
    assert not (run / "final").exists()
    monkeypatch.setattr(loop, "train_step", None)  # no step is left
    assert train(recipe, resume=True) is None
    assert metrics(recipe, "valid") == metrics(uninterrupted, "valid")[-1:]
    for kind in ("test", "faults"):
        assert metrics(recipe, kind) == metrics(uninterrupted, kind)
    assert (run / "final" / "evaluation.json").is_file()


def test_after_a_truncated_checkpoint_the_one_before_it_is_continued(uninterrupted, tmp_path, caplog):
    recipe = make_recipe(tmp_path)
    train(make_recipe(tmp_path, "training.max_steps=6"))
    weights = Path(recipe.training.output_dir) / "checkpoints/step_00000006/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    leftover = weights.parents[1] / ".step_00000007.incomplete"
    leftover.mkdir()
    train(recipe, resume=True)
    assert str(weights) in caplog.text
    assert not leftover.exists()
    assert_same_run(uninterrupted, recipe)


def test_if_no_checkpoint_is_whole_the_run_stops_and_names_them(tmp_path):
    recipe = make_recipe(tmp_path, "training.max_steps=2")
    train(recipe)
    folder = Path(recipe.training.output_dir) / "checkpoints"
    (folder / "step_00000002/manifest.json").unlink()
    before = (Path(recipe.training.output_dir) / "metrics.jsonl").read_text()
    with pytest.raises(CheckpointError, match=r"no checkpoint is complete.*step_00000002.*manifest"):
        train(recipe, resume=True)
    assert (Path(recipe.training.output_dir) / "metrics.jsonl").read_text() == before


def test_resuming_where_nothing_was_saved_starts_at_the_beginning(uninterrupted, tmp_path, capsys):
    recipe = make_recipe(tmp_path)
    train(recipe, resume=True)
    assert "starting at step 0" in capsys.readouterr().out
    assert_same_run(uninterrupted, recipe)


def test_a_finished_run_cannot_be_resumed_to_fewer_steps(tmp_path):
    train(make_recipe(tmp_path, "training.max_steps=4"))
    with pytest.raises(ConfigError, match=r"training\.max_steps=2.*step 4"):
        train(make_recipe(tmp_path, "training.max_steps=2"), resume=True)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.vocab_size=290", "model_config.vocab_size: 300 there, 290 here"),
        ("model.cell.d_inner=48", "model_config.cell.d_inner: 32 there, 48 here"),
        ("training.optimizer.lr=0.02", "recipe.training.optimizer.lr: 0.01 there, 0.02 here"),
        ("training.batch_size=2", "recipe.training.batch_size: 4 there, 2 here"),
        ("seed=2", "recipe.seed: 1 there, 2 here"),
        ("training.max_steps_jitter=1", "recipe.training.max_steps_jitter: 0 there, 1 here"),
        ("training.jacobian.weight=0.2", "recipe.training.jacobian.weight: 0.1 there, 0.2 here"),
    ],
)
def test_a_run_with_other_settings_is_refused_and_each_difference_named(tmp_path, override, words):
    train(make_recipe(tmp_path, "training.max_steps=2"))
    with pytest.raises(CheckpointError, match="belongs to another run") as caught:
        train(make_recipe(tmp_path, override), resume=True)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_on_changed_text_is_refused(tmp_path):
    train(make_recipe(tmp_path, "training.max_steps=2"))
    recipe = make_recipe(tmp_path)
    text = Path(recipe.data.data_dir) / "train.txt"
    text.write_text(text.read_text() + "more.\n")
    with pytest.raises(CheckpointError, match="data_fingerprint"):
        train(recipe, resume=True)
