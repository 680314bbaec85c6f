import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for fuzzing.py


@pytest.fixture(scope="session", autouse=True)
def _on_the_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield
