"""scripts/train_lm.py: what it prints and how it exits."""

import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny_run import recipe_mapping

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "train_lm.py"


def call(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["train_lm.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return caught.value.code


@pytest.fixture
def recipe(tmp_path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_mapping(tmp_path)), encoding="utf-8")
    return str(path)


def test_a_run_ends_with_zero_and_a_second_one_does_not_touch_it(monkeypatch, recipe, tmp_path, capsys):
    assert call(monkeypatch, recipe, "training.max_steps=2") == 0
    run = tmp_path / "run"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    capsys.readouterr()
    assert call(monkeypatch, recipe, "training.max_steps=2") == 2
    captured = capsys.readouterr()
    assert captured.err == (
        f"train_lm: {run}: already holds files, and a run is never overwritten; continue it with --resume, or set "
        "training.output_dir to a new folder.\n"
    )
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert call(monkeypatch, recipe, "--resume", "training.max_steps=4") == 0
    assert "resuming from" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["training.max_step=2"], "did you mean max_steps?"),
        (["training.optimizer.lr=1e-3"], "write 1.0e-3"),
        (["data.data_dir=/absent"], "/absent"),
        (["training.segment_length=100000"], "segment"),
        (["training.batch_size=3", "evaluation.batch_size=0"], "batch_size"),
    ],
)
def test_a_mistake_is_one_line_exit_two_and_nothing_written(monkeypatch, recipe, tmp_path, capsys, arguments, words):
    assert call(monkeypatch, recipe, *arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("train_lm: ")
    assert message.count("\n") == 1
    assert words in message
    assert not (tmp_path / "run").exists()


def test_a_missing_recipe_is_one_line(monkeypatch, tmp_path, capsys):
    assert call(monkeypatch, str(tmp_path / "absent.yaml")) == 2
    assert capsys.readouterr().err == (
        f"train_lm: {tmp_path / 'absent.yaml'}: No such file or directory; give the path of a YAML recipe.\n"
    )


def test_help_shows_examples_and_imports_nothing_heavy():
    code = (
        "import runpy, sys; sys.argv = ['train_lm.py', '--help']\n"
        "try: runpy.run_path(SCRIPT, run_name='__main__')\n"
        "except SystemExit: print('heavy' if {'torch', 'transformers'} & sys.modules.keys() else 'light')\n"
    ).replace("SCRIPT", repr(str(SCRIPT)))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "accelerate launch scripts/train_lm.py recipes/demo_cpu.yaml" in result.stdout
    assert result.stdout.endswith("light\n")


def test_a_run_that_was_asked_to_stop_ends_with_the_number_of_the_signal(monkeypatch, recipe, tmp_path):
    from deq_lm.training import loop

    step = loop.train_step

    def step_then_signal(*args: object, **kwargs: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.setattr(loop, "train_step", step)
        return step(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", step_then_signal)
    assert call(monkeypatch, recipe) == 143
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000002"]


def test_a_run_that_stops_being_finite_ends_with_three(monkeypatch, recipe, capsys):
    from deq_lm.training import loop

    def fail(*_: object, **__: object) -> None:
        raise FloatingPointError("step 9: loss not finite")

    monkeypatch.setattr(loop, "train_step", fail)
    assert call(monkeypatch, recipe) == 3
    assert capsys.readouterr().err.endswith("train_lm: step 9: loss not finite\n")


def test_a_run_that_raises_for_an_unconverged_adjoint_is_one_line_and_ends_with_three(monkeypatch, recipe, capsys):
    overrides = [
        "model.adjoint={name: implicit, stopping: {max_steps: 1, rtol: 1.0e-4}}",
        "training.faults.unconverged_adjoint={policy: raise, limit: 1.0e-3}",
    ]
    assert call(monkeypatch, recipe, *overrides) == 3
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("train_lm: step 3: an adjoint solve did not converge")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
)
def test_out_of_memory_is_one_line_that_says_what_to_lower_and_ends_with_four(monkeypatch, recipe, capsys, error):
    from deq_lm.training import loop

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(loop, "train_step", fail)
    assert call(monkeypatch, recipe) == 4
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("train_lm: out of memory. A step holds 4 streams of 8 tokens")
    for setting in ("training.batch_size", "training.segment_length", "model.solver.history_size=8"):
        assert setting in message


def test_a_disk_that_fills_between_two_checkpoints_is_one_line_and_the_run_goes_on_when_there_is_space(
    monkeypatch, recipe, tmp_path, capsys
):
    from deq_lm.training.tracking import Tracker

    record = Tracker.record

    def full(self: Tracker, step: int, *arguments: object) -> None:
        if step == 3:
            raise OSError(28, "No space left on device")
        record(self, step, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "record", full)
        assert call(patch, recipe) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "train_lm: [Errno 28] No space left on device"
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000002"]
    assert call(monkeypatch, recipe, "--resume") == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_a_disk_that_fills_when_the_model_is_written_at_the_end_is_one_line_and_resuming_writes_it(
    monkeypatch, recipe, tmp_path, capsys, name
):
    from deq_lm.training import durable, loop

    def begin_on_a_full_disk(path: Path) -> Path:
        aside = durable.begin_folder(path)
        (aside / name).symlink_to("/dev/full")
        return aside

    with monkeypatch.context() as patch:
        patch.setattr(loop, "begin_folder", begin_on_a_full_disk)
        assert call(patch, recipe) == 2
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run" / "final").exists()
    assert call(monkeypatch, recipe, "--resume") == 0
    assert (tmp_path / "run" / "final" / name).is_file()


def test_a_folder_that_cannot_be_written_is_one_line(monkeypatch, recipe, tmp_path, capsys):
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert call(monkeypatch, recipe, f"training.output_dir={tmp_path}/file/run") == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f"{tmp_path}/file/run" in message


def test_another_error_of_ours_is_not_taken_for_it(monkeypatch, recipe):
    from deq_lm.training import loop

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(loop, "train_step", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        call(monkeypatch, recipe)


def test_a_dry_run_ends_with_zero_and_leaves_no_run(monkeypatch, recipe, tmp_path, capsys):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert call(monkeypatch, recipe, "--dry-run") == 0
    assert "memory of a step, MB" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()
    assert call(monkeypatch, recipe, "--dry-run", "--resume") == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("give one of the two")
