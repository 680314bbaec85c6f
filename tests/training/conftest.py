"""Training tests run on the CPU, whatever the machine has: they compare bits."""

import pytest


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.delenv("MASTER_PORT", raising=False)
