"""run_suite(): train what is missing, measure what is asked for, and write each measurement as soon as it is there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from deq_lm.errors import CheckpointError, DataError
from deq_lm.evaluation import EvaluationResult, evaluate, read_record, write_record
from deq_lm.evaluation.records import Record
from deq_lm.structure import to_mapping
from deq_lm.suites.config import Suite
from deq_lm.suites.convergence import measure_convergence
from deq_lm.suites.cost import measure_cost
from deq_lm.suites.learning import read_learning
from deq_lm.suites.memory import measure_memory
from deq_lm.suites.subjects import Subject
from deq_lm.training.durable import write_text
from deq_lm.training.recipe import recipe_text

TRAIN_SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "train_lm.py"


def run_suite(suite: Suite, subjects: Sequence[Subject], output: Path) -> None:
    """Do all that a suite asks for, and write the results into `output`, one JSON file each.

    Args:
        suite: what to do.
        subjects: the models, of `subjects_of`.
        output: a folder; made if it is not there. Files of the same names are replaced.

    Raises:
        CheckpointError: a model that has to be trained is not, or its training failed.
        ConfigError, DataError: what training and measuring raise.
    """
    needs_training = suite.evaluation or suite.cost or suite.convergence
    for subject in subjects if needs_training else ():
        if suite.train and not subject.is_trained:
            train_run(subject)
        subject.check_is_trained()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{output}: cannot be made ({error.strerror}). Choose another --output.") from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def write(name: str, record: Record) -> None:
        write_record(output / f"{name}.json", record)
        print(f"written: {output / name}.json", flush=True)

    for subject in subjects:
        if suite.evaluation is not None:
            write(f"evaluation_{subject.label}", evaluate_subject(subject, suite.evaluation.split, device))
        if subject.run.metrics.is_file():
            write(f"learning_{subject.label}", read_learning(suite.name, subject))
        if suite.convergence is not None and subject.recipe.model_config.depth == "equilibrium":
            result = measure_convergence(suite.name, subject, suite.convergence, device)
            write(f"convergence_{subject.label}", result)
    if suite.memory is not None:
        write("memory", measure_memory(suite.name, subjects, suite.memory, device))
    if suite.cost is not None:
        write("cost", measure_cost(suite.name, subjects, suite.cost, device))


def train_run(subject: Subject) -> None:
    """Train in a process of its own, or go on with a run that was interrupted.

    Raises:
        CheckpointError: it failed; its output says why.
    """
    print(f"training {subject.label} in {subject.run.path}", flush=True)
    recipe = subject.run.path.with_name(f"{subject.run.path.name}.yaml")
    recipe.parent.mkdir(parents=True, exist_ok=True)
    write_text(recipe, recipe_text(subject.recipe))
    resume = ["--resume"] if subject.run.path.exists() else []
    command = [sys.executable, str(TRAIN_SCRIPT), str(recipe), *resume]
    status = subprocess.run(command, check=False).returncode
    recipe.unlink()
    if status != 0:
        raise CheckpointError(
            f"{subject.run.path}: training ended with exit code {status}, as said above. Start the suite again to go on."
        )


def evaluate_subject(subject: Subject, split: str, device: torch.device) -> EvaluationResult:
    """All that `evaluate` measures, named as in the suite: what the run has measured at its end, if it is of that split."""
    recipe = to_mapping(replace(subject.recipe, name=subject.name))
    own = _evaluation_of_run(subject)
    if own is not None and (own.split, own.evaluation, own.seed) == (split, subject.recipe.evaluation, subject.seed):
        return replace(own, location=str(subject.run.path), recipe=recipe)
    return evaluate(
        subject.trained(device),
        subject.corpus(),
        subject.recipe.evaluation,
        split=split,
        seed=subject.seed,
        location=str(subject.run.path),
        recipe=recipe,
    )


def _evaluation_of_run(subject: Subject) -> EvaluationResult | None:
    try:
        return read_record(subject.run.final / "evaluation.json", EvaluationResult)
    except DataError:  # none, or of another version
        return None
