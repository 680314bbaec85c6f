"""The problem suite says what is true of its problems: their solutions, their causality, their spectral radius."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "eval" / "benchmarks"


def load(name: str):
    """A script of eval/benchmarks, which is no package."""
    specification = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module


problems = load("benchmark_problems") if (FOLDER / "benchmark_problems.py").exists() else load("problems")
