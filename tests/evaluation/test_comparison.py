"""Results side by side: refused where they cannot be compared, seeds pooled, and no win without evidence."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_run import make_recipe

from deq_lm.errors import DataError
from deq_lm.evaluation import EvaluationResult, compare, is_best_by_evidence, paired_difference, read_record
from deq_lm.training import train

SCRIPT = Path(__file__).resolve().parents[2] / "eval" / "report.py"


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> EvaluationResult:
    """A real result."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        recipe = make_recipe(tmp_path_factory.mktemp("run"), "training.max_steps=2")
        assert train(recipe) is None
    return read_record(Path(recipe.training.output_dir) / "final" / "evaluation.json", EvaluationResult)


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


def test_the_lowest_is_first_and_best_only_if_the_intervals_are_apart(measured: EvaluationResult):
    def best(**losses: list[float]) -> tuple[list[str], bool]:
        results = [
            like(measured, name=name, nats_per_token=loss, seed=seed)
            for name, seeds in losses.items()
            for seed, loss in enumerate(seeds)
        ]
        rows = compare(results)
        return [row.name for row in rows], is_best_by_evidence(rows)

    assert best(a=[3.0, 3.01], b=[2.0, 2.01]) == (["b", "a"], True)
    assert best(a=[3.0, 3.5], b=[2.0, 2.5]) == (["b", "a"], False)  # a difference, but of two runs that differ as much
    assert best(a=[3.0], b=[2.0]) == (["b", "a"], False)  # one run has no interval
    assert best(a=[3.0, 3.01]) == (["a"], False)  # of nothing


def test_a_difference_is_paired_by_seed(measured: EvaluationResult):
    losses = {"a": {0: 3.0, 1: 5.0, 2: 4.0}, "b": {0: 2.9, 1: 4.8, 3: 9.0}}
    results = [
        like(measured, name=name, nats_per_token=nats, seed=seed)
        for name, seeds in losses.items()
        for seed, nats in seeds.items()
    ]
    mean, interval = paired_difference(results, "b", "a")
    assert mean == pytest.approx(-0.15)
    assert interval == pytest.approx(12.706 * math.sqrt(2 * 0.05**2) / math.sqrt(2), rel=1e-3)
    assert paired_difference(results[:1] + results[3:4], "a", "b") == (pytest.approx(0.1), None)
    assert paired_difference(results[2:], "a", "b") is None


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
