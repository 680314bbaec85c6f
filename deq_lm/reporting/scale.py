"""Losses by scale: models of one depth and size, by the tokens and operations of their training."""

from __future__ import annotations

from dataclasses import dataclass

from deq_lm.evaluation import EvaluationResult, compare, model_name
from deq_lm.reporting.measurements import Measurements
from deq_lm.suites import CostResult


@dataclass(frozen=True)
class ScalePoint:
    """One model of a family.

    Attributes:
        tokens: trained on.
        nats: per token of the test text, mean over the runs.
        interval: half the width of the 95 % interval of that mean; None of a single run.
        operations: of its training; None where its cost was not measured.
    """

    tokens: int
    nats: float
    interval: float | None
    operations: float | None


def families(measurements: Measurements) -> dict[tuple[str, int], list[ScalePoint]]:
    """Models of one kind and number of parameters that differ in the tokens they were trained on, of the first text.

    Empty if no two do. Of several that were trained on as many tokens the first of the results counts.
    """
    results = next(iter(measurements.texts().values()), [])
    cost = measurements.first(CostResult)
    flops = {row.model: row.training_flops for row in (cost.rows if cost else ())}
    kinds = {model_name(result): _kind(result) for result in results}
    order = list(kinds)
    found: dict[tuple[str, int], dict[int, ScalePoint]] = {}
    for row in sorted(compare(results) if results else (), key=lambda row: order.index(row.name)):
        if (tokens := row.training_tokens) is not None:
            operations = flops[row.name] * tokens if row.name in flops else None
            point = ScalePoint(tokens, row.nats_per_token, row.interval, operations)
            found.setdefault((kinds[row.name], row.parameters.total), {}).setdefault(tokens, point)
    if all(len(points) < 2 for points in found.values()):
        return {}
    return {family: [points[tokens] for tokens in sorted(points)] for family, points in sorted(found.items())}


def _kind(result: EvaluationResult) -> str:
    """What tells curves apart, in words; the curves' equilibria are all regularized."""
    depth = str(result.model["depth"])
    if depth == "equilibrium":
        return depth
    if depth == "stack":
        return "untied"
    regularized = (result.recipe or {}).get("training", {}).get("jacobian") is not None
    return f"unrolled {result.model['num_layers']}" + ", regularized" * regularized
