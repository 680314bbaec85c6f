"""How many inputs a fuzz test tries: some by default, thousands with the slow tests, 10,000 and more of these together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy

QUICK, SLOW = 50, 2000

sizes = pytest.mark.parametrize("num_inputs", [QUICK, pytest.param(SLOW, marks=pytest.mark.slow)])


def fuzz(check: Callable[[Any], None], inputs: SearchStrategy[Any], num_inputs: int) -> None:
    """Call `check` with so many inputs; the smallest one it fails with is shown."""

    @settings(max_examples=num_inputs, deadline=None, suppress_health_check=list(HealthCheck))
    @given(inputs)
    def run(value: Any) -> None:
        check(value)

    run()
