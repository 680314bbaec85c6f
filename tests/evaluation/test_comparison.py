"""Results side by side: refused where they cannot be compared, seeds pooled, and no win without evidence."""

from __future__ import annotations

import json
import math
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from tiny_run import make_recipe

from deq_lm.errors import DataError
from deq_lm.evaluation import EvaluationResult, compare, comparison_table, read_result, write_result
from deq_lm.training import train

SCRIPT = Path(__file__).resolve().parents[2] / "eval" / "report.py"


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> EvaluationResult:
    """A real result."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        recipe = make_recipe(tmp_path_factory.mktemp("run"), "training.max_steps=2")
        assert train(recipe) is None
    AcceleratorState._reset_state(reset_partial_state=True)  # other tests begin with one of their own
    return read_result(Path(recipe.training.output_dir) / "final" / "evaluation.json")


def like(result: EvaluationResult, *, name: str, nats_per_token: float, seed: int = 0, **fields) -> EvaluationResult:
    perplexity = replace(result.perplexity, nll_nats=nats_per_token * result.perplexity.num_tokens)
    recipe = {**(result.recipe or {}), "name": name}
    return replace(result, perplexity=perplexity, recipe=recipe, seed=seed, **fields)


def test_seeds_of_a_recipe_are_one_row_with_students_interval(measured: EvaluationResult):
    losses = [2.0, 2.1, 2.3]
    (row,) = compare([like(measured, name="a", nats_per_token=loss, seed=i) for i, loss in enumerate(losses)])
    mean = sum(losses) / 3
    deviation = math.sqrt(sum((loss - mean) ** 2 for loss in losses) / 2)
    assert row.num_seeds == 3
    assert row.nats_per_token == pytest.approx(mean)
    assert row.interval == pytest.approx(4.303 * deviation / math.sqrt(3))
    assert row.training_tokens == 2 * 4 * 8 * 2
    assert row.parameters.total == row.parameters.embedding + row.parameters.other > 0


def test_the_interval_of_many_seeds_is_never_too_narrow(measured: EvaluationResult):
    losses = [2.0 + 0.1 * (i % 2) for i in range(14)]
    (row,) = compare([like(measured, name="a", nats_per_token=loss, seed=i) for i, loss in enumerate(losses)])
    deviation = math.sqrt(14 * 0.05**2 / 13)
    assert row.interval is not None
    assert 2.160 <= row.interval / (deviation / math.sqrt(14)) < 2.3  # Student's t of 13 degrees of freedom


def test_the_lowest_is_first_and_marked_only_if_the_intervals_are_apart(measured: EvaluationResult):
    def marks(**losses: list[float]) -> list[str]:
        results = [
            like(measured, name=name, nats_per_token=loss, seed=seed)
            for name, seeds in losses.items()
            for seed, loss in enumerate(seeds)
        ]
        return [row["model"] for row in comparison_table(compare(results))]

    assert marks(a=[3.0, 3.01], b=[2.0, 2.01]) == ["b *", "a"]
    assert marks(a=[3.0, 3.5], b=[2.0, 2.5]) == ["b", "a"]  # a difference, but of two runs that differ as much
    assert marks(a=[3.0], b=[2.0]) == ["b", "a"]  # one run has no interval


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"split": "valid"}, "split valid and test"),
        ({"data_fingerprint": "other"}, "data fingerprint other"),
        ({"precision": "bfloat16"}, "precision bfloat16 and float32"),
    ],
)
def test_what_was_not_measured_alike_is_refused(measured: EvaluationResult, change: dict, words: str):
    other = like(measured, name="b", nats_per_token=2.0, **change)
    with pytest.raises(DataError, match=f"b and .* cannot be compared: {words}"):
        compare([measured, other])


def test_another_protocol_memory_or_a_dropped_tail_is_refused(measured: EvaluationResult):
    others = {
        "segment length": {"evaluation": replace(measured.evaluation, segment_length=4)},
        "memory length": {"model": {**measured.model, "cell": {**measured.model["cell"], "mem_len": 4}}},
        "tokens": {"perplexity": replace(measured.perplexity, num_tokens=measured.perplexity.num_tokens - 1)},
    }
    for what, change in others.items():
        with pytest.raises(DataError, match=f"cannot be compared: {what}"):
            compare([measured, replace(measured, **change)])


def test_a_loss_that_is_not_finite_is_refused(measured: EvaluationResult):
    broken = replace(measured, perplexity=replace(measured.perplexity, nll_nats=None))
    with pytest.raises(DataError, match="its loss is not finite"):
        compare([broken])


def call(monkeypatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return caught.value.code


def test_the_script_prints_and_writes_the_table(measured: EvaluationResult, monkeypatch, tmp_path, capsys):
    run = tmp_path / "run"
    (run / "final").mkdir(parents=True)
    write_result(run / "final" / "evaluation.json", like(measured, name="ours", nats_per_token=2.0))
    write_result(tmp_path / "theirs.json", like(measured, name="theirs", nats_per_token=3.0))
    assert call(monkeypatch, run, tmp_path / "theirs.json", "--output", tmp_path / "table.json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:4]] == ["ours", "theirs"]
    rows = json.loads((tmp_path / "table.json").read_text("utf-8"))["tables"]["test split"]
    assert [row["nats per token"] for row in rows] == ["2.000", "3.000"]


def test_the_script_fails_in_one_line(monkeypatch, tmp_path, capsys):
    assert call(monkeypatch, tmp_path / "none.json") == 2
    assert "no such file" in capsys.readouterr().err
    (tmp_path / "old.json").write_text('{"schema_version": 0}')
    assert call(monkeypatch, tmp_path / "old.json") == 2
    assert "this deq_lm reads version" in capsys.readouterr().err
