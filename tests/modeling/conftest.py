"""Token ids for the tiny model."""

import pytest
import torch
from tiny_model import VOCABULARY
from torch import Tensor


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))
