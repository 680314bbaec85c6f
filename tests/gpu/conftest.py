"""What is here needs a GPU, and is skipped without one."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "gpu":
            # of the first product in a thread of autograd's
            item.add_marker(
                pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA")
            )
            item.add_marker(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))
