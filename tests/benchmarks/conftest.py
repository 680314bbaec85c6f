"""The scripts of eval/benchmarks as modules; they are no package, and import each other by name."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "eval" / "benchmarks"


def load(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses look themselves up there
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def problems(monkeypatch) -> ModuleType:
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return load("problem_suite")


@pytest.fixture
def robustness(monkeypatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", list(sys.path))
    return load("robustness")
