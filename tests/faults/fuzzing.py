"""How many inputs a fuzz test tries: some by default, thousands with the slow tests, 10,000 and more of these together."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy

QUICK, SLOW = 50, 2000

sizes = pytest.mark.parametrize("num_inputs", [QUICK, pytest.param(SLOW, marks=pytest.mark.slow)])


def places(mapping: dict[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The keys that lead to each value of nested sections, and to each section."""
    for key, value in mapping.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from places(value, (*prefix, key))


def fuzz(check: Callable[[Any], None], inputs: SearchStrategy[Any], num_inputs: int) -> None:
    """Call `check` with so many inputs; the smallest one it fails with is shown.

    Where DEQ_LM_FUZZ_COUNTS names a file, how many there were is added to it, for eval/reliability/fuzz.py.
    """
    count, clean = 0, False

    @settings(max_examples=num_inputs, deadline=None, suppress_health_check=list(HealthCheck))
    @given(inputs)
    def run(value: Any) -> None:
        nonlocal count
        count += 1
        check(value)

    try:
        run()
        clean = True
    finally:
        if "DEQ_LM_FUZZ_COUNTS" in os.environ:
            test = os.environ["PYTEST_CURRENT_TEST"].rpartition("::")[2].removesuffix(" (call)")
            with open(os.environ["DEQ_LM_FUZZ_COUNTS"], "a", encoding="utf-8") as file:
                file.write(json.dumps({"test": test, "inputs": count, "clean": clean}) + "\n")
