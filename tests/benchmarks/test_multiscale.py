"""The copy at a distance: what is asked for can be known from so far back and no less, and it is scored as it is."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType, SimpleNamespace

import pytest
import torch
from scripts_of_eval import load


@pytest.fixture
def multiscale(monkeypatch) -> Iterator[ModuleType]:
    module = load("benchmarks/multiscale")
    monkeypatch.setattr(module, "ProcessPoolExecutor", ThreadPoolExecutor)  # which sees what is set here
    for name, value in {"DISTANCE": 24, "SEGMENT": 8, "STREAMS": 2, "COPIES": 2}.items():
        monkeypatch.setattr(module, name, value)
    yield module
    del sys.modules["multiscale"]


def test_every_token_after_the_first_distance_is_asked_for_and_is_the_one_so_far_back(multiscale):
    pieces = list(multiscale.streams(torch.Generator().manual_seed(0), 24))
    ids, targets = (torch.cat(tensors, dim=1) for tensors in zip(*pieces, strict=True))
    assert ids.shape == (2, 3 * 24)
    assert (targets[:, :23] == -100).all()
    assert torch.equal(targets[:, 23:-1], ids[:, 24:])
    assert torch.equal(targets[:, 23:], ids[:, :-23])
    assert all(len(row.unique()) > 1 for row in ids)


def test_training_comes_to_the_distance_by_doubling(multiscale):
    periods = [multiscale.period_at(i / 16) for i in range(16)]
    assert periods == [1, 1, 3, 3, 6, 6, 12, 12] + [24] * 8


def test_the_cells_have_as_many_parameters_and_the_single_rate_does_no_less_arithmetic(multiscale):
    models = {name: multiscale.make(cell, 0) for name, cell in multiscale.CELLS.items()}
    numbers = [multiscale.num_parameters(model) for model in models.values()]
    assert max(numbers) <= 1.01 * min(numbers)
    flops = [multiscale.score(model)["FLOPs"] for model in models.values()]
    assert flops[0] < flops[1]


def test_a_model_that_knows_the_copy_has_no_loss_and_one_that_knows_nothing_that_of_chance(multiscale):
    class Copier:
        """Is told the targets, and makes as much of them as `certainty` says."""

        def __init__(self, certainty: float) -> None:
            self.certainty = certainty

        def __call__(self, ids, *, targets, memory):
            known = torch.nn.functional.one_hot(targets.clamp(min=0), multiscale.SYMBOLS)
            logits = self.certainty * known.float()
            scored = targets >= 0
            nll = torch.nn.functional.cross_entropy(logits[scored], targets[scored], reduction="sum")
            solution = SimpleNamespace(num_evaluations=torch.ones(2))
            return SimpleNamespace(
                logits=logits, nll_nats=nll, num_targets=scored.sum(), solution=solution, memory=None
            )

        def eval(self):
            return self

        def model(self, ids, **_):
            return ids.float() @ ids.float().T

    for certainty, nats in ((100.0, 0.0), (0.0, math.log(multiscale.SYMBOLS))):
        found = multiscale.score(Copier(certainty))
        assert found["nats per token"] == pytest.approx(nats, abs=1e-6)
        assert (found["accuracy"] == 1.0) == (certainty > 0)
        assert found["FLOPs"] == round(2 * 2 * 2 * 8 / 16)


def test_it_writes_the_table_and_the_losses_on_the_way(multiscale, monkeypatch, tmp_path, capsys):
    output = tmp_path / "multiscale.json"
    cells = ["--cells", "multiscale", "single rate"]
    monkeypatch.setattr(sys, "argv", ["multiscale.py", "--steps", "12", *cells, "--output", str(output)])
    assert multiscale.main() == 0
    result = json.loads(output.read_text("utf-8"))
    assert [row["cell"] for row in result["tables"]["copy"]] == ["multiscale", "single rate"]
    assert all(0 < row["nats per token"] < 3 and row["steps"] == 12 for row in result["tables"]["copy"])
    assert [record["step"] for record in result["training"]] == [12, 12]
    assert "| multiscale |" in capsys.readouterr().out
