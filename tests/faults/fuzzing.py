"""How many inputs a fuzz test tries: some by default, thousands with the slow tests, 10,000 and more of these together."""

from __future__ import annotations

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
    """Call `check` with so many inputs; the smallest one it fails with is shown."""

    @settings(max_examples=num_inputs, deadline=None, suppress_health_check=list(HealthCheck))
    @given(inputs)
    def run(value: Any) -> None:
        check(value)

    run()
