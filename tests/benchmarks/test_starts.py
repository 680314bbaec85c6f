"""The starts that are compared are those of the segment before, and solves from all of them end in one equilibrium."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_model import VOCABULARY, make

from deq_lm.errors import DataError

FOLDER = Path(__file__).resolve().parents[2] / "eval" / "benchmarks"


def test_every_start_leads_to_the_equilibria_of_the_model_whose_memory_is_its_own(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    starts = importlib.import_module("starts")
    model = make(stopping={"max_steps": 60, "rtol": 1e-6}).eval()
    ids = torch.randint(1, VOCABULARY, (2, 18), generator=torch.Generator().manual_seed(0))
    found = starts.solves(model, ids, 6, 1e-6)
    memory, own = None, []
    for segment in ids.split(6, dim=1):
        output = model(segment, memory=memory)
        memory = output.memory
        own.append(output.solution)
    assert {name: len(solutions) for name, solutions in found.items()} == dict.fromkeys(starts.STARTS, 2)
    for name, solutions in found.items():
        for solution, from_zero, expected in zip(solutions, found["zero"], own[1:], strict=True):
            torch.testing.assert_close(solution.z, expected.z, rtol=0, atol=1e-4)
            is_zero = solution.trace.residual_norm[0] == from_zero.trace.residual_norm[0]
            assert is_zero.all() if name == "zero" else not is_zero.any()
    for from_zero, expected in zip(found["zero"], own[1:], strict=True):
        assert torch.equal(from_zero.num_evaluations, expected.num_evaluations)


def test_the_last_position_and_the_mean_are_everywhere(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    starts = importlib.import_module("starts")
    z = torch.arange(12.0).view(1, 3, 4)
    made = {name: start(z) for name, start in starts.STARTS.items()}
    assert torch.equal(made["the same position of the segment before"], z)
    assert torch.equal(made["the last position of the segment before"], z[:, [2, 2, 2]])
    assert torch.equal(made["the mean of the segment before"], z[:, [1, 1, 1]])


def test_a_text_too_short_for_the_streams_is_refused(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    cells = importlib.import_module("cells")
    split = SimpleNamespace(tokens=np.arange(8 * 20, dtype=np.uint16))
    monkeypatch.setattr(cells, "load_recipe", lambda _: SimpleNamespace(data=None))
    monkeypatch.setattr(cells, "prepare", lambda _: SimpleNamespace(splits={"test": split}))
    assert cells.token_ids(Path("run"), torch.device("cpu"), length=20)[1].tolist() == list(range(20, 40))
    with pytest.raises(DataError, match=r"has 160 tokens, and 8 streams of 21 are 168\. Ask for fewer"):
        cells.token_ids(Path("run"), torch.device("cpu"), length=21)
