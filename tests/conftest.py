"""One thread a process, so that results and timings do not depend on how many tests run side by side; no network."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for the processes the tests start

import socket
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny_run import make_recipe

from deq_lm.training import train

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _own_accelerator():
    """The library keeps one state a process, mixed precision included; the tests of a file begin without."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """The folder of a finished run; not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        recipe = make_recipe(tmp_path_factory.mktemp("run"), "evaluation.no_op_segments=1", "training.max_steps=4")
        assert train(recipe) is None
    return Path(recipe.training.output_dir)


@pytest.fixture(autouse=True, scope="session")
def _no_network():
    """Nothing in the tests needs it; a connection to another machine is an error."""
    connect = socket.socket.connect

    def connect_here(self: socket.socket, address: object) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):  # pyright: ignore
            raise AssertionError(f"a test connects to {address}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_here)
        yield
