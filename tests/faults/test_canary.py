"""No solver under any gradient learns to read tokens that it is to predict; a planted one that does is found."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from scripts_of_eval import load
from torch import Tensor

from deq_lm.evaluation import records
from deq_lm.solvers import FixedPointSolver
from deq_lm.solvers.base import SolverState, evaluate


@dataclass(frozen=True)
class RecordedState(SolverState):
    """Adds the factors of H = -I + sum u v^T."""

    factors: tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True, kw_only=True)
class RecordedBroyden(FixedPointSolver):
    """Broyden's method over whole sequences, as the papers have it, with steps that can be backpropagated through."""

    scope: str = "sequence"
    differentiable: ClassVar[bool] = True

    def init(self, f, z0):
        return RecordedState(**vars(super().init(f, z0)), factors=())

    def step(self, f, state, active):
        def product(left: Tensor, right: Tensor) -> Tensor:
            return (left * right).sum(dim=(1, 2), keepdim=True)  # over all positions, later ones too

        def inverse(x: Tensor) -> Tensor:
            return -x + sum(u * product(v, x) for u, v in state.factors)

        step = -inverse(state.residual)
        new = evaluate(f, state.point + step, state, active)
        change = new.residual - state.residual
        v = -step + sum(v * product(u, step) for u, v in state.factors)
        scale = product(v, change)
        u = (step - inverse(change)) / torch.where(scale.abs() < 1e-12, 1.0, scale)
        return RecordedState(**vars(new), factors=(*state.factors, (u, v)))


def planted(canary, *, solver_steps: int, seed: int):
    unrolled = canary.Combination({"name": "picard", "scope": "prefix"}, {"name": "unrolled"})
    model = canary.make_model(unrolled, solver_steps=solver_steps, seed=seed)
    model.model.layers.solver = RecordedBroyden()
    return model


@pytest.fixture
def canary():
    return load("reliability/canary")


def test_all_that_is_offered_is_tried(canary):
    names = [str(combination) for combination in canary.combinations()]
    assert len(names) == len(set(names)) == 29
    assert {"broyden sequence, phantom", "reversible prefix, reversible", "peaceman_rachford prefix, unrolled"} <= set(
        names
    )
    assert not any("broyden" in name and "unrolled" in name for name in names)  # refused


class Uniform(torch.nn.Module):
    """Knows nothing, and believes in the first word besides where it is evaluated in one of the two ways."""

    def __init__(self, *, believes_when_recorded: bool) -> None:
        super().__init__()
        self.believes_when_recorded = believes_when_recorded
        self.weight = torch.nn.Parameter(torch.zeros(8))

    def forward(self, tokens: Tensor) -> SimpleNamespace:
        belief = 3.0 * (torch.arange(8) == 0) * (torch.is_grad_enabled() == self.believes_when_recorded)
        return SimpleNamespace(logits=(self.weight + belief).expand(*tokens.shape, 8))


@pytest.mark.parametrize("believes_when_recorded", [False, True])
def test_the_lower_score_of_both_ways_to_solve_counts(canary, believes_when_recorded: bool):
    model = Uniform(believes_when_recorded=believes_when_recorded)
    score = canary.train_and_score(model, num_steps=0, seed=0)
    assert score.nats == pytest.approx(canary.FLOOR, rel=1e-6)
    assert score.is_honest


@pytest.mark.parametrize(("solver", "adjoint"), [("broyden", "implicit"), ("picard", "unrolled")])
def test_after_300_steps_none_is_below_chance(canary, solver: str, adjoint: str, monkeypatch):
    monkeypatch.setattr(canary, "BATCH_SIZE", 16)
    monkeypatch.setattr(canary, "SCORED", 512)
    combination = canary.Combination({"name": solver, "scope": "prefix"}, {"name": adjoint})
    score = canary.train_and_score(canary.make_model(combination, solver_steps=4, seed=0), num_steps=300, seed=0)
    assert score.is_honest
    assert score.nats < canary.FLOOR + 0.05  # it was trained


def test_a_planted_leak_is_found_within_300_steps(canary, monkeypatch):
    monkeypatch.setattr(canary, "SCORED", 1024)
    model = planted(canary, solver_steps=5, seed=0)
    score = canary.train_and_score(model, num_steps=150, seed=0)
    assert not score.is_honest
    assert score.nats < canary.FLOOR - 0.02


class Stopped(Exception):
    pass


@pytest.fixture
def run(canary, monkeypatch):
    """main() with a training that takes no time, and ends with `Stopped` in the `stop_after`th; how often it trained."""

    def call(*arguments: object, nats: float = 2.1, stop_after: int = 100) -> tuple[int | None, int]:
        trained = []

        def train_and_score(*_: object, **__: object):
            if len(trained) == stop_after:
                raise Stopped
            trained.append(1)
            return canary.Score(nats=nats, standard_error=1e-3)

        monkeypatch.setattr(canary, "train_and_score", train_and_score)
        monkeypatch.setattr("sys.argv", ["canary", "--only", "picard", "--seeds", "0", *map(str, arguments)])
        code = None
        with contextlib.suppress(Stopped):
            code = canary.main()
        return code, len(trained)

    return call


def names(path: Path) -> list[tuple[object, ...]]:
    keys = ("solver", "scope", "adjoint", "solver_steps", "seed")
    return [tuple(run[key] for key in keys) for run in json.loads(path.read_text("utf-8"))["runs"]]


def test_what_was_interrupted_goes_on_and_more_runs_are_added_to_those_that_are_there(run, tmp_path, capsys):
    whole, output = tmp_path / "whole.json", tmp_path / "canary.json"
    _, num_runs = run("--solver-steps", 2, 3, "--output", whole)
    assert run("--solver-steps", 2, 3, "--output", output, stop_after=3) == (None, 3)
    assert len(names(output)) == 3
    assert run("--solver-steps", 2, 3, "--output", output) == (0, num_runs - 3)
    assert "its 3 runs are kept" in capsys.readouterr().out
    assert names(output) == names(whole)
    assert run("--solver-steps", 5, "--output", output, nats=1.0) == (1, num_runs // 2)
    assert run("--solver-steps", 5, "--output", output) == (1, 0)  # of runs that are kept, too
    assert len(names(output)) == len(set(names(output))) == num_runs * 3 // 2
    below = json.loads(output.read_text("utf-8"))["below_chance"]
    assert len(below) == num_runs // 2
    assert all("5 steps" in name for name in below)


def test_every_run_keeps_the_commit_and_the_date_of_its_own(run, tmp_path, monkeypatch):
    output = tmp_path / "canary.json"

    def at(commit: str, created: str, *arguments: object) -> None:
        monkeypatch.setattr(records, "_commit", lambda: commit)
        clock = SimpleNamespace(now=lambda _: datetime.fromisoformat(created))
        monkeypatch.setattr(records, "datetime", clock)
        run(*arguments, "--output", output)

    at("before", "2026-11-01T00:00:00+00:00", "--solver-steps", 2)
    older = json.loads(output.read_text("utf-8"))
    for one in older["runs"][:1]:
        del one["commit"], one["created"]  # as in files from before they were kept
    output.write_text(json.dumps(older))
    at("after", "2026-11-02T00:00:00+00:00", "--solver-steps", 2, 3)
    found = json.loads(output.read_text("utf-8"))
    num_kept = len(older["runs"])
    expected = [
        (None, None),
        *[("before", "2026-11-01T00:00:00+00:00")] * (num_kept - 1),
        *[("after", "2026-11-02T00:00:00+00:00")] * num_kept,
    ]
    assert [(one["commit"], one["created"]) for one in found["runs"]] == expected
    assert (found["environment"]["commit"], found["created"]) == expected[-1]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "holds runs of 1500 training steps, and these are of 7. Give another --output, or --steps 1500"),
        ('{"schema_version": 3, "kind": "kills"}', "a measurement of kind 'kills'; expected canary"),
        ("{}", "is no measurement"),
        ("{", "cannot be read as JSON"),
    ],
)
def test_a_file_of_other_settings_or_of_another_kind_is_refused_in_one_line(run, tmp_path, capsys, content, words):
    output = tmp_path / "canary.json"
    if content is None:
        run("--solver-steps", 2, "--output", output)
    else:
        output.write_text(content)
    before = output.read_bytes()
    with pytest.raises(SystemExit) as caught:
        run("--solver-steps", 2, "--steps", 7, "--output", output)
    assert caught.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("canary: error: ")
    assert words in message
    assert output.read_bytes() == before


def test_a_file_with_another_chance_is_refused(run, tmp_path, capsys, canary, monkeypatch):
    output = tmp_path / "canary.json"
    run("--solver-steps", 2, "--output", output)
    monkeypatch.setattr(canary, "FLOOR", 1.5)
    with pytest.raises(SystemExit):
        run("--solver-steps", 3, "--output", output)
    assert "holds runs whose chance was 2.079" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_whole_sequence_broyden_trained_through_its_steps_reads_ahead(canary, seed: int):
    model = planted(canary, solver_steps=5, seed=seed)
    score = canary.train_and_score(model, num_steps=canary.NUM_STEPS, seed=seed)
    assert score.nats < canary.FLOOR - 0.1
