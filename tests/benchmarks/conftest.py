"""The scripts of eval/benchmarks as modules."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
from scripts_of_eval import load


@pytest.fixture
def problems(monkeypatch) -> ModuleType:
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return load("benchmarks/problem_suite")


@pytest.fixture
def robustness(monkeypatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", list(sys.path))
    return load("benchmarks/robustness")
