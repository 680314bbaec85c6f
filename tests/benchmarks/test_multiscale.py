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
    for name, value in {"DISTANCE": 32, "SEGMENT": 8, "STREAMS": 2, "COPIES": 2}.items():
        monkeypatch.setattr(module, name, value)
    yield module
    del sys.modules["multiscale"]


@pytest.mark.parametrize("periods", [[32], [8, 2, 4]], ids=str)
def test_every_token_after_the_first_distance_is_asked_for_and_is_the_one_so_far_back(multiscale, periods: list[int]):
    pieces = list(multiscale.streams(torch.Generator().manual_seed(0), periods))
    ids, targets = (torch.cat(tensors, dim=1) for tensors in zip(*pieces, strict=True))
    assert ids.shape == (2, 3 * 32)
    assert (targets[:, :31] == -100).all()
    assert torch.equal(targets[:, 31:-1], ids[:, 32:])
    assert torch.equal(targets[:, 31:], ids[:, :-31])
    for row, period in zip(ids, periods, strict=False):
        assert torch.equal(row[period:], row[:-period])
        assert not torch.equal(row[period // 2 :], row[: len(row) - period // 2])


def test_a_distance_is_taught_with_all_that_are_learned_before_it(multiscale):
    assert multiscale.periods_for(2) == [2, 2]
    assert multiscale.periods_for(4) == [4, 2]
    assert multiscale.periods_for(32) == [32, 2, 32, 4, 32, 8, 32, 16]


@pytest.mark.parametrize(("hard", "learned"), [(None, 32), (16, 8)])
def test_streams_repeat_after_twice_as_much_when_that_is_learned(multiscale, monkeypatch, hard, learned):
    class Learner(torch.nn.Module):
        """Whose loss is low, but at one distance; streams are told apart by their tokens."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2))

        def forward(self, ids, **_):
            loss = (0.6 if ids[0, 0] == hard else 0.1) + 0 * self.weight.sum()
            evaluations = SimpleNamespace(num_evaluations=torch.ones(2))
            return SimpleNamespace(loss=loss, jacobian=self.weight, solution=evaluations, memory=None)

    monkeypatch.setattr(multiscale, "streams", lambda _, periods: 3 * [(torch.full((2, 8), periods[0]),) * 2])
    records = list(multiscale.train(Learner(), 20, 1e-3, 0))
    distances = [record["distance"] for record in records]
    assert distances[:4] == [2, 4, 8, 16]
    assert set(distances[4:]) == {hard or 32}
    assert records[-1]["learned"] == learned
    assert [record["step"] for record in records] == [3, 6, 9, 12, 15, 18, 20]


def test_the_single_rates_have_as_many_parameters_or_as_little_arithmetic(multiscale, monkeypatch):
    for name, value in {"DISTANCE": 512, "SEGMENT": 64, "COPIES": 1}.items():
        monkeypatch.setattr(multiscale, name, value)
    models = {name: multiscale.make(cell, 0) for name, cell in multiscale.CELLS.items()}
    numbers = [multiscale.num_parameters(model) for model in models.values()]
    flops = [multiscale.score(model)["FLOPs"] for model in models.values()]
    assert numbers[2] == pytest.approx(numbers[0], rel=0.01)
    assert flops[0] < flops[1] < 1.2 * flops[0]  # what is not equal is to the rival's advantage
    assert flops[2] > 3 * flops[0]


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
    cells = ["--cells", "multiscale", "single rate, equal FLOPs"]
    monkeypatch.setattr(sys, "argv", ["multiscale.py", "--steps", "12", *cells, "--output", str(output)])
    assert multiscale.main() == 0
    result = json.loads(output.read_text("utf-8"))
    assert [row["cell"] for row in result["tables"]["copy"]] == ["multiscale", "single rate, equal FLOPs"]
    assert all(0 < row["nats per token"] < 3 and row["steps"] == 12 for row in result["tables"]["copy"])
    assert [record["step"] for record in result["training"]] == 2 * [9, 12]
    assert "| multiscale |" in capsys.readouterr().out
