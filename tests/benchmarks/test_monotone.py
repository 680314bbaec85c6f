"""The monotone cell keeps its promises on drawn weights, and the benchmark that says so would see it if it did not."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from scripts_of_eval import FOLDER, load


@pytest.fixture
def monotone(monkeypatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(FOLDER / "benchmarks")  # where it imports its neighbours from
    yield load("benchmarks/monotone")
    del sys.modules["monotone"]


@pytest.mark.parametrize("family", ["random", "adversarial"])
def test_every_sequence_converges_within_the_proved_bound_to_one_solution_from_any_start(monotone, family: str):
    draws = [monotone.measure(family, seed, 16) for seed in range(1, 9)]
    for draw in draws:
        assert draw.converged == [True, True], draw
        assert all(steps <= bound for steps, bound in zip(draw.steps, draw.bounds, strict=True)), draw
        assert draw.apart <= 1e-5, draw
    rows = list(monotone.summary(draws))
    assert [row["within the bound"] for row in rows] == [8, 8]
    assert max(row["largest steps / bound"] for row in rows) > 0.1  # the bound is not so loose that it says nothing


def test_a_cell_without_its_margin_is_seen_to_break_its_bound(monotone, monkeypatch):
    """Taps that are not scaled to delta: the bound that is claimed is then another operator's."""
    monkeypatch.setattr("deq_lm.cells.monotone._shrink", lambda size, limit: torch.ones_like(size))
    monkeypatch.setattr(monotone, "tame", lambda cell: None)
    monkeypatch.setattr(monotone, "MAX_STEPS", 400)
    draws = [monotone.measure("random", seed, 16) for seed in range(1, 9)]
    assert not all(draw.converged[0] and draw.steps[0] <= draw.bounds[0] for draw in draws)


def test_it_writes_tables_and_plots_those_of_training_runs_included(monotone, monkeypatch, tmp_path, capsys):
    same = {"kind": "train", "adjoint_share_converged": 0.25, "solver_evaluations": 7.0, "loss": 5.0}
    lines = [{**same, "step": step, "solver_share_converged": share} for step, share in ((20, 1.0), (40, 0.5))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = tmp_path / "monotone.json"
    monkeypatch.setattr(monotone, "STEP_SIZES", range(0, 9, 4))
    arguments = ["--draws", "2", "--adversarial", "1", "--longest", "5", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["monotone.py", *arguments, "--runs", f"tiny={tmp_path}"])
    assert monotone.main() == 0
    tables = json.loads(output.read_text("utf-8"))["tables"]
    assert [row["draws"] for row in tables["convergence"]] == [2, 2, 1, 1]
    sweep = tables["steps against step size"]
    assert sweep[0]["step / proved limit"] == 1.0
    assert sweep[0]["forward-backward"] > sweep[0]["Peaceman-Rachford"]
    assert tables["convergence over training"][0]["converged, worst stretch"] == 0.5
    for name in ("monotone_step_size.svg", "monotone_training.svg"):
        assert "<svg" in (tmp_path / name).read_text("utf-8")
    assert "| tiny | 40 | 0.75 | 0.5 | 0.25 | 7 | 5 |" in capsys.readouterr().out
