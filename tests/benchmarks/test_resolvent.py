"""The forms of the resolvent that are timed do the same, and the benchmark says how long each takes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from scripts_of_eval import FOLDER, load

from deq_lm.cells.causal_operator import CausalOperator


@pytest.fixture
def resolvent(monkeypatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(FOLDER / "benchmarks")  # where it imports its neighbours from
    yield load("benchmarks/resolvent")
    del sys.modules["resolvent"]


@pytest.mark.parametrize("num_taps", [0, 1, 4])
@pytest.mark.parametrize("length", [3, 16, 37])
def test_all_forms_give_what_the_recurrence_gives(resolvent, num_taps: int, length: int):
    torch.manual_seed(0)
    with torch.no_grad():
        by_steps = CausalOperator(0.1 * torch.randn(6, 6 * (num_taps + 1)).double()).resolvent(0.5)
        r = torch.randn(2, length, 6, dtype=torch.float64)
        for name, make in resolvent.FORMS.items():
            torch.testing.assert_close(make(by_steps)(r), by_steps(r), rtol=0, atol=1e-13, msg=name)


def test_it_times_every_form_and_writes_the_tables(resolvent, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(resolvent, "APPLIED", [(2, 20, 8, 2)])
    monkeypatch.setattr(resolvent, "SOLVED", {"tiny": (2, 20, 8, 2)})
    output = tmp_path / "resolvent.json"
    monkeypatch.setattr(sys, "argv", ["resolvent.py", "--rounds", "1", "--device", "cpu", "--output", str(output)])
    assert resolvent.main() == 0
    tables = json.loads(output.read_text("utf-8"))["tables"]
    assert [row["form"] for row in tables["whole solve"]] == list(resolvent.FORMS)
    assert [row["dtype"] for row in tables["one application"]] == ["float32", "float64"]
    assert tables["whole solve"][0]["gain"] == 1.0
    assert "| tiny | 2 | 20 | 8 | 2 |" in capsys.readouterr().out
