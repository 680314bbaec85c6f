"""One thread a worker, so that results and timings do not depend on how many tests run side by side."""

import torch

torch.set_num_threads(1)
