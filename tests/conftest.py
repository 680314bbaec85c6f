"""One thread a process, so that results and timings do not depend on how many tests run side by side."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for the processes the tests start

import pytest
import torch
from accelerate.state import AcceleratorState

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _own_accelerator():
    """The library keeps one state a process, mixed precision included; the tests of a file begin without."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
