"""One thread a process, so that results and timings do not depend on how many tests run side by side."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for the processes the tests start

import torch

torch.set_num_threads(1)
