"""Checkpoints: nothing is lost, nothing is mixed, and no damage goes unseen."""

import itertools
import os
import random
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tiny_run import make_recipe, make_state

from deq_lm.errors import CheckpointError
from deq_lm.training import checkpoint, durable, loop
from deq_lm.training.checkpoint import damage, newest_complete, restore, save
from deq_lm.training.step import train_step

WRITTEN_ASIDE = ["state.json", "rank_00000.json", "manifest.json"]
FILES = [*WRITTEN_ASIDE, "model.safetensors", "rank_00000.safetensors", "optimizer.pt"]
FILES += ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]


class Run:
    """A state and what is needed to save it."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.folder = folder / "checkpoints"
        self.recipe = make_recipe(folder, *overrides)
        self.accelerator = Accelerator()
        self.state, self.identity, self.tokenizer = make_state(self.recipe, self.accelerator)

    def step(self) -> None:
        train_step(self.accelerator, self.state.model, self.state, self.recipe, stop_requested=False)

    def save(self, keep: int = 5) -> Path:
        return save(self.folder, self.state, self.identity, self.tokenizer, self.accelerator, keep=keep)

    def restore(self, path: Path) -> None:
        restore(path, self.state, self.identity, rank=0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the checkpoints of steps 1 and 2; a test that alters them takes a copy."""
    folder = tmp_path_factory.mktemp("saved")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        run = Run(folder)
        for _ in range(2):
            run.step()
            run.save()
    return folder


@pytest.fixture
def checkpoints(saved, tmp_path):
    shutil.copytree(saved / "checkpoints", tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def test_everything_a_step_depends_on_comes_back(tmp_path):
    run = Run(tmp_path)
    for _ in range(3):
        run.step()
    path = run.save()
    draws = [random.random(), np.random.rand(), torch.rand(()).item()]  # noqa: NPY002
    other = Run(tmp_path)
    other.restore(path)
    assert draws == [random.random(), np.random.rand(), torch.rand(()).item()]  # noqa: NPY002
    for name, tensor in run.state.model.state_dict().items():
        assert tensor.equal(other.state.model.state_dict()[name])
    moments, other_moments = (r.state.optimizer.state_dict()["state"] for r in (run, other))
    assert all(torch.equal(moments[i]["exp_avg_sq"], other_moments[i]["exp_avg_sq"]) for i in moments)
    assert other.state.schedule.get_last_lr() == run.state.schedule.get_last_lr()
    assert other.state.streams.state_dict() == run.state.streams.state_dict()
    assert other.state.progress == run.state.progress
    assert other.state.interval == run.state.interval
    assert other.state.memory.z.equal(run.state.memory.z)
    assert other.state.memory.x.equal(run.state.memory.x)


def test_padding_in_memory_comes_back(tmp_path):
    run, other = Run(tmp_path), Run(tmp_path)
    run.step()
    mask = torch.tensor([[False, True, True]] * 4)
    run.state.memory = run.state.memory.mark_padding(mask)
    other.restore(run.save())
    assert torch.equal(other.state.memory.mask, run.state.memory.mask)
    assert not other.state.memory.mask.all()
    assert torch.equal(other.state.memory.num_tokens, run.state.memory.num_tokens)


def test_the_newest_are_kept(tmp_path):
    run = Run(tmp_path)
    for _ in range(4):
        run.step()
        run.save(keep=2)
    assert sorted(path.name for path in run.folder.iterdir()) == ["step_00000003", "step_00000004"]
    assert newest_complete(run.folder).name == "step_00000004"


def test_the_best_is_kept_beside_the_newest(tmp_path):
    run = Run(tmp_path)
    losses = [3.0, 2.0, None, 2.0, 2.5, 1.5]
    kept = []
    for loss in losses:
        run.step()
        run.state.progress.is_best(loss)
        run.save(keep=1)
        kept.append(sorted(int(path.name[5:]) for path in run.folder.iterdir()))
    assert kept == [[1], [2], [2, 3], [2, 4], [2, 5], [6]]


class Killed(BaseException):
    """Like a kill, nothing of ours catches it."""


def test_a_kill_before_any_change_on_the_disk_leaves_whole_checkpoints_only(checkpoints, saved, tmp_path, monkeypatch):
    """Every sync, rename and removal of a save is the last thing that is not done, one after the other."""
    run = Run(saved)
    run.restore(checkpoints / "step_00000002")
    run.step()
    countdown = None

    def guard(name: str) -> None:
        call = getattr(os, name)

        def guarded(*arguments: Any, **options: Any) -> Any:
            nonlocal countdown
            if countdown is not None:
                countdown -= 1
                if countdown < 0:
                    raise Killed
            return call(*arguments, **options)

        monkeypatch.setattr(os, name, guarded)

    for name in ("fsync", "replace", "unlink", "rmdir"):
        guard(name)
    newest = []
    for allowed in itertools.count():
        run.folder = tmp_path / f"killed_{allowed}"
        shutil.copytree(checkpoints, run.folder)
        countdown = allowed
        try:
            run.save(keep=1)
        except Killed:
            pass
        else:
            break
        finally:
            countdown = None
        assert [path.name for path in run.folder.glob("step_*") if damage(path) is not None] == []
        newest.append(newest_complete(run.folder).name)
        assert run.save(keep=1) == newest_complete(run.folder)  # what is left aside does not disturb
        assert [path.name for path in run.folder.glob("step_*")] == ["step_00000003"]
        shutil.rmtree(run.folder)
    assert newest == sorted(newest)
    assert set(newest) == {"step_00000002", "step_00000003"}
    assert len(newest) > 40


@pytest.fixture
def disk(monkeypatch, caplog):
    """What is warned of with so many bytes free."""

    def warned(free: float, what, *args, **kwargs) -> str:
        caplog.clear()
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=int(free)))
        what(*args, **kwargs)
        return caplog.text

    return warned


def test_a_disk_that_cannot_hold_the_checkpoints_to_come_is_warned_of_with_both_sizes(tmp_path, disk):
    run = Run(tmp_path, "model.cell.d_model=128", "model.cell.d_inner=512")
    run.folder.mkdir()
    ask = (checkpoint.warn_of_little_space, run.folder, run.state.model)
    empty = [disk(free, *ask, keep=3) for free in (4e6, 40e6)]
    run.step()
    size = sum(path.stat().st_size for path in run.save(keep=3).iterdir())
    # the 3 newest, the best, the one being written, and the weights alone, a third of one
    assert [disk(times * size, *ask, keep=3) != "" for times in (3.9, 4.7)] == [True, False]
    assert "0.004 GB free, and up to 5 checkpoints of 0.0036" in empty[0]
    assert empty[1] == ""


def test_a_run_says_so_before_its_first_step(tmp_path, disk):
    recipe = make_recipe(tmp_path, "training.max_steps=1")
    said = disk(1000, loop.train, recipe)
    assert "1e-06 GB free, and up to 4 checkpoints" in said
    assert "lower training.keep_checkpoints" in said
    assert disk(1e9, loop.train, recipe, resume=True) == ""


def test_a_full_disk_is_an_error_of_one_line_and_leaves_nothing_aside(tmp_path, monkeypatch):
    run = Run(tmp_path)
    run.step()
    run.save()
    run.step()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write_shared_files", full)
        with pytest.raises(CheckpointError, match=r"step_00000002: could not be written.*No space left"):
            run.save()
    assert [path.name for path in run.folder.iterdir()] == ["step_00000001"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("name", FILES)
def test_whichever_file_a_full_disk_stops_it_is_an_error_of_one_line(tmp_path, monkeypatch, name):
    run = Run(tmp_path)
    run.step()
    first = run.save()
    run.step()
    sizes = {path.name: path.stat().st_size for path in first.iterdir()}
    largest, unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if name.endswith(".safetensors"):  # written under a name of its library's choice; it is the first that is too large
        largest = sizes[name] - 1
        assert all(size <= largest for other, size in sizes.items() if other.startswith("rank") and other != name)

    def begin_on_a_full_disk(path: Path) -> Path:
        aside = durable.begin_folder(path)
        if not name.endswith(".safetensors"):
            target = f".{name}.incomplete" if name in WRITTEN_ASIDE else name
            (aside / target).symlink_to("/dev/full")
        return aside

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "begin_folder", begin_on_a_full_disk)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, unlimited))
        try:
            with pytest.raises(
                CheckpointError, match=r"step_00000002: could not be written \(.*before it are intact"
            ) as caught:
                run.save()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))
    assert "\n" not in str(caught.value)
    assert newest_complete(run.folder) == first
    assert [path.name for path in run.folder.iterdir()] == [first.name]


def test_no_checkpoint_at_all_is_none(tmp_path):
    assert newest_complete(tmp_path / "absent") is None
    (tmp_path / "notes").mkdir()
    assert newest_complete(tmp_path) is None


def test_a_flipped_bit_in_any_file_is_noticed_and_the_file_named(checkpoints):
    draw = random.Random(0)
    path = checkpoints / "step_00000002"
    assert damage(path) is None
    for file in sorted(path.rglob("*")):
        content = file.read_bytes()
        for position in draw.sample(range(len(content)), k=min(100, len(content))):
            flipped = bytearray(content)
            flipped[position] ^= 1 << draw.randrange(8)
            file.write_bytes(flipped)
            assert damage(path) is not None, (file.name, position)
            if file.name != "manifest.json":
                assert str(file) in damage(path)
        file.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("length", [0, 100, -1])
def test_after_a_truncated_file_the_checkpoint_before_is_taken_and_the_file_named(checkpoints, caplog, name, length):
    file = checkpoints / "step_00000002" / name
    file.write_bytes(file.read_bytes()[:length])
    assert newest_complete(checkpoints) == checkpoints / "step_00000001"
    assert str(file) in caplog.text


def test_missing_extra_and_swapped_files_are_noticed(checkpoints):
    newer, older = checkpoints / "step_00000002", checkpoints / "step_00000001"
    shutil.copy(older / "optimizer.pt", newer / "optimizer.pt")
    assert "optimizer.pt: differs" in damage(newer)
    (newer / "optimizer.pt").unlink()
    assert "optimizer.pt: missing" in damage(newer)
    (older / "extra.bin").write_text("x")
    assert "extra.bin: not in the manifest" in damage(older)
    with pytest.raises(CheckpointError, match=r"no checkpoint is complete.*optimizer\.pt.*extra\.bin"):
        newest_complete(checkpoints)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.vocab_size=290"], ["model_config.vocab_size: 300 there, 290 here"]),
        (["model.cell.d_model=24", "training.clip_norm=null"], ["d_model: 16 there, 24", "clip_norm: 1.0 there, null"]),
        (["model.cell.num_heads=4"], ["model_config.cell.num_heads: 2 there, 4 here"]),
        (["model.cell.mem_len=4"], ["model_config.cell.mem_len: 8 there, 4 here"]),
        (["model.cell.norm=pre"], ['model_config.cell.norm: "post" there, "pre" here']),
        (["model.cell.dropout=0.2"], ["model_config.cell.dropout: 0.1 there, 0.2 here"]),
        (["model.solver={name: anderson}"], ['model_config.solver.name: "broyden" there, "anderson" here']),
        (
            ["model.solver={name: broyden, scope: sequence}"],
            ['model_config.solver.scope: "prefix" there, "sequence" here'],
        ),
        (["model.stopping.rtol=1.0e-2"], ["model_config.stopping.rtol: 0.001 there, 0.01 here"]),
        (
            ["model.adjoint={name: phantom}", "training.faults.unconverged_adjoint.policy=ignore"],
            ['model_config.adjoint.name: "implicit" there, "phantom" here'],
        ),
        (["data.tokenizer=sentencepiece"], ['recipe.data.tokenizer: "bpe" there, "sentencepiece" here', "fingerprint"]),
        (["training.segment_length=12"], ["recipe.training.segment_length: 8 there, 12 here"]),
        (["training.gradient_accumulation=1"], ["recipe.training.gradient_accumulation: 2 there, 1 here"]),
        (["training.optimizer.betas=[0.9, 0.99]"], ["recipe.training.optimizer.betas"]),
        (["training.schedule.warmup_steps=3"], ["recipe.training.schedule.warmup_steps: 2 there, 3 here"]),
        (["training.mixed_precision=bf16"], ['recipe.training.mixed_precision: null there, "bf16" here']),
        (["training.phases=[]"], ["phases"]),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_before_any_tensor_is_touched(saved, tmp_path, overrides, words):
    run = Run(tmp_path, *overrides)
    before = {name: tensor.clone() for name, tensor in run.state.model.state_dict().items()}
    random_state = torch.get_rng_state()
    with pytest.raises(CheckpointError, match="belongs to another run") as caught:
        run.restore(saved / "checkpoints" / "step_00000002")
    assert [word for word in words if word not in str(caught.value)] == []
    assert all(tensor.equal(before[name]) for name, tensor in run.state.model.state_dict().items())
    assert torch.get_rng_state().equal(random_state)
    assert run.state.progress.step == 0


def test_settings_that_decide_no_update_may_change(saved):
    run = Run(saved, "training.max_steps=6", "training.log_every=7", "evaluation.batch_size=1", "training.track=true")
    run.restore(saved / "checkpoints" / "step_00000002")
    assert run.state.progress.step == 2


def test_an_evaluation_rule_left_out_is_the_stopping_rule_spelled_out(saved):
    path = saved / "checkpoints" / "step_00000002"
    Run(saved, "model.evaluation_stopping={max_steps: 6, rtol: 1.0e-3}").restore(path)
    with pytest.raises(CheckpointError, match=r"evaluation_stopping\.max_steps: 6 there, 7 here"):
        Run(saved, "model.evaluation_stopping={max_steps: 7, rtol: 1.0e-3}").restore(path)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_a_pickle_in_the_optimizers_place_is_not_executed(checkpoints, saved, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = checkpoints / "step_00000002"
    torch.save(Evil(), path / "optimizer.pt")
    checkpoint.write_manifest(path)
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        Run(saved).restore(path)
    assert not Path("executed").exists()
