"""One run in a folder at a time."""

import fcntl
import multiprocessing
import os
import signal
import socket

import pytest
from tiny_run import make_recipe

from deq_lm.errors import CheckpointError
from deq_lm.training import loop
from deq_lm.training.loop import train
from deq_lm.training.run_folder import RunFolder

FORK = multiprocessing.get_context("fork")


def hold(path, ready) -> None:
    with RunFolder(path).locked():
        ready.set()
        signal.pause()


@pytest.fixture
def holder(tmp_path):
    """A process that trains in tmp_path / "run", as far as others can see."""
    ready = FORK.Event()
    process = FORK.Process(target=hold, args=(tmp_path / "run", ready))
    process.start()
    assert ready.wait(20)
    yield process
    process.kill()
    process.join()


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_run_is_refused_before_it_reads_its_text_and_told_who_is_there(tmp_path, holder, resume, monkeypatch):
    recipe = make_recipe(tmp_path)
    monkeypatch.setattr(loop, "prepare", lambda _: pytest.fail("text was read"))
    with pytest.raises(CheckpointError, match=rf"run: .*process {holder.pid} on {socket.gethostname()}"):
        train(recipe, resume=resume)


def test_of_two_runs_that_start_at_once_one_is_refused_and_touches_nothing(tmp_path, holder, monkeypatch):
    recipe = make_recipe(tmp_path)
    monkeypatch.setattr(RunFolder, "check", lambda *_, **__: None)  # both have looked before either was there
    with pytest.raises(CheckpointError, match="another run is writing to it"):
        train(recipe)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


def test_the_lock_of_a_process_that_was_killed_is_nobodys(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    recipe = make_recipe(tmp_path, "training.max_steps=1")
    train(recipe)  # a folder with nothing but a lock in it is a new one
    train(make_recipe(tmp_path, "training.max_steps=2"), resume=True)


def test_the_lock_is_let_go_when_a_run_fails(tmp_path, monkeypatch):
    recipe = make_recipe(tmp_path, "training.max_steps=2")

    def fail(*_, **__):
        raise RuntimeError("a step")

    with monkeypatch.context() as context:
        context.setattr(loop, "train_step", fail)
        with pytest.raises(RuntimeError, match="a step"):
            train(recipe)
    train(recipe, resume=True)


def test_processes_that_look_at_the_same_time_do_not_refuse_each_other(tmp_path):
    run = RunFolder(tmp_path / "run")
    with run.locked():
        pass
    with open(run.lock_file) as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        run.check(resume=False)
