"""eval/run.py, all of it: trains what is missing, measures, writes, and fails in one line."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from tiny_run import metrics

from deq_lm.evaluation import EvaluationResult, read_record
from deq_lm.suites import LearningResult
from deq_lm.suites.learning import read_learning
from deq_lm.suites.run import evaluate_subject

SCRIPT = Path(__file__).resolve().parents[2] / "eval" / "run.py"
CPU = torch.device("cpu")


def call(monkeypatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return caught.value.code


def write_suite(folder: Path, recipes: dict[str, Path], **settings) -> Path:
    path = folder / "tiny.yaml"
    models = {name: {"recipe": str(file)} for name, file in recipes.items()}
    path.write_text(yaml.safe_dump({"name": "tiny", "models": models, **settings}), encoding="utf-8")
    return path


def test_a_suite_trains_what_is_missing_and_measures_all(monkeypatch, recipes, tmp_path, capfd):
    suite = write_suite(
        tmp_path,
        recipes,
        train=True,
        evaluation={"split": "valid"},
        memory={"num_evaluations": [2]},
        cost={"rounds": 1},
        convergence={"num_evaluations": [1, 4], "num_segments": 2, "solvers": []},
    )
    results, runs = tmp_path / "results", tmp_path / "runs"
    arguments = (suite, "training.max_steps=4", "training.schedule.decay_steps=4", "--runs", runs, "--output", results)
    assert call(monkeypatch, *arguments) == 0
    assert {path.name for path in results.iterdir()} == {
        "evaluation_equilibrium_0.json",
        "evaluation_unrolled_0.json",
        "learning_equilibrium_0.json",
        "learning_unrolled_0.json",
        "convergence_equilibrium_0.json",
        "memory.json",
        "cost.json",
    }
    result = read_record(results / "evaluation_unrolled_0.json", EvaluationResult)
    assert (result.split, result.recipe["name"], result.recipe["training"]["max_steps"]) == ("valid", "unrolled", 4)
    assert {path.name for path in runs.iterdir()} == {"equilibrium_0", "unrolled_0"}

    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.is_file()}
    capfd.readouterr()
    assert call(monkeypatch, suite, *arguments[3:], "--models", "unrolled", "--seeds", "0", *arguments[1:3]) == 0
    assert "training unrolled" not in capfd.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.is_file()} == before


def test_what_a_run_has_measured_at_its_end_is_not_measured_again(monkeypatch, subjects):
    def refuse(*_, **__):
        raise AssertionError("measured")

    subject = subjects[1]
    own = read_record(subject.run.final / "evaluation.json", EvaluationResult)
    monkeypatch.setattr("deq_lm.suites.run.evaluate", refuse)
    taken = evaluate_subject(replace(subject, name="renamed"), "test", CPU)
    assert taken == replace(own, location=str(subject.run.path), recipe={**own.recipe, "name": "renamed"})
    other = replace(subject.recipe, evaluation=replace(subject.recipe.evaluation, mem_len=0))
    for changed, split in ((subject, "valid"), (replace(subject, recipe=other), "test")):
        with pytest.raises(AssertionError, match="measured"):
            evaluate_subject(changed, split, CPU)


def test_learning_is_what_the_run_has_logged(subjects):
    result = read_learning("tiny", subjects[0])
    logged = metrics(subjects[0].recipe, "train")
    assert [point.nats_per_token for point in result.training] == [line["loss"] for line in logged]
    assert [point.num_tokens for point in result.training] == [4 * 8 * line["step"] for line in logged]
    seconds = [4 * 8 / line["tokens_per_second"] for line in logged]  # a line a step
    assert result.training[-1].seconds == pytest.approx(sum(seconds))
    assert [point.step for point in result.validation] == [4, 8]


def test_a_run_without_metrics_is_no_error_in_a_suite(monkeypatch, subjects, tmp_path):
    run = subjects[1].run.path
    suite = write_suite(tmp_path, {}, evaluation={"split": "test"})
    assert call(monkeypatch, suite, "--models", run, "--output", tmp_path / "results") == 0
    assert read_record(tmp_path / "results" / "learning_unrolled_1.json", LearningResult).seed == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "nothing.yaml: No such file"),
        (["perplexity"], "has no models of its own"),
        (["perplexity", "--models", "absent"], "no model of the suite perplexity"),
        (["compare", "model.cell.d_moddel=3"], "d_moddel: unknown key"),
        (["compare", "--seeds", "0", "model.cell.d_moddel=3"], "d_moddel: unknown key"),
        (["compare", "--models", "unrolled", "model.cell.d_moddel=3"], "d_moddel: unknown key"),
        (["compare", "training"], "training"),
    ],
)
def test_a_mistake_is_one_line(monkeypatch, capsys, tmp_path, arguments: list[str], message: str):
    monkeypatch.chdir(SCRIPT.parents[1])
    assert call(monkeypatch, *arguments, "--output", tmp_path / "results") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "results").exists()


def test_a_seed_that_is_no_number_is_named(monkeypatch, capsys):
    assert call(monkeypatch, "compare", "--seeds", "0", "one") == 2
    assert "--seeds one: expected whole numbers" in capsys.readouterr().err


def test_a_suite_that_does_not_train_says_what_is_missing(monkeypatch, capsys, recipes, tmp_path):
    suite = write_suite(tmp_path, recipes, cost={"rounds": 1})
    assert call(monkeypatch, suite, "--runs", tmp_path, "--output", tmp_path / "results") == 2
    assert "no finished run of equilibrium with seed 0" in capsys.readouterr().err


def test_metrics_that_are_damaged_are_refused(subjects, tmp_path):
    from dataclasses import replace

    from deq_lm.errors import DataError
    from deq_lm.training.run_folder import RunFolder

    (tmp_path / "metrics.jsonl").write_text(json.dumps([1]) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="cannot be read as the metrics of a run"):
        read_learning("tiny", replace(subjects[0], run=RunFolder(tmp_path)))
