"""How a run learned: its losses against steps, tokens and seconds, from the metrics it has logged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from deq_lm.errors import DataError
from deq_lm.evaluation.records import Record, provenance
from deq_lm.structure import to_mapping
from deq_lm.suites.subjects import Subject


@dataclass(frozen=True, kw_only=True)
class LearningPoint:
    """What was logged of the steps since the point before.

    Attributes:
        step: the last of them.
        num_tokens: trained on until then.
        seconds: of all steps until then, evaluation and checkpoints left out.
        nats_per_token: of the training text; None if no loss was finite.
        solver_evaluations: mean in a forward solve; None without one.
        solver_residual: median of the relative residuals; None likewise.
        adjoint_residual: of the adjoint solves, likewise.
        grad_norm: of the last step, before clipping.
        device_peak_bytes: the most that torch allocated on its GPU in these steps; None without a GPU.
    """

    step: int
    num_tokens: int
    seconds: float
    nats_per_token: float | None
    solver_evaluations: float | None
    solver_residual: float | None
    adjoint_residual: float | None
    grad_norm: float | None
    device_peak_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class ValidationPoint:
    """A validation during training.

    Attributes:
        step: when.
        nats_per_token: of the validation text, or of the part that the recipe says; None if it is not finite.
    """

    step: int
    nats_per_token: float | None


@dataclass(frozen=True, kw_only=True)
class LearningResult(Record):
    """The metrics of one run.

    Attributes:
        suite: its name.
        model: its name in the suite.
        seed: of the run.
        recipe: of the run.
        training: the points, in order.
        validation: likewise.
    """

    kind: ClassVar[str] = "learning"

    suite: str
    model: str
    seed: int
    recipe: Mapping[str, Any]
    training: tuple[LearningPoint, ...]
    validation: tuple[ValidationPoint, ...]


def read_learning(suite: str, subject: Subject) -> LearningResult:
    """What a run has logged.

    Raises:
        DataError: its metrics.jsonl is missing or damaged.
    """
    path, settings = subject.run.metrics, subject.recipe.training
    try:
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        by_step = {kind: {line["step"]: line for line in lines if line["kind"] == kind} for kind in ("train", "valid")}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: cannot be read as the metrics of a run ({error}). Train it again.") from error
    tokens_per_step = settings.batch_size * settings.segment_length * settings.gradient_accumulation
    points: list[LearningPoint] = []
    for step, line in sorted(by_step["train"].items()):  # of steps that a resumed run took twice, the later line
        num_steps = step - (points[-1].step if points else 0)
        rate = line["tokens_per_second"]
        seconds = num_steps * tokens_per_step / rate if rate else 0.0
        points.append(
            LearningPoint(
                step=step,
                num_tokens=step * tokens_per_step,
                seconds=seconds + (points[-1].seconds if points else 0.0),
                nats_per_token=line["loss"],
                **{name: line[name] for name in _COPIED},
            )
        )
    validation = [
        ValidationPoint(step=step, nats_per_token=line["nats_per_token"])
        for step, line in sorted(by_step["valid"].items())
    ]
    return LearningResult(
        **provenance(),
        suite=suite,
        model=subject.name,
        seed=subject.seed,
        recipe=to_mapping(subject.recipe),
        training=tuple(points),
        validation=tuple(validation),
    )


_COPIED = ("solver_evaluations", "solver_residual", "adjoint_residual", "grad_norm", "device_peak_bytes")
