"""What is told of the solves of trained equilibria, a row each."""

from __future__ import annotations

from collections.abc import Sequence

from deq_lm.reporting.table import Row, number
from deq_lm.suites import ConvergenceResult


def two_start_rows(results: Sequence[ConvergenceResult]) -> list[Row]:
    """Whether two starts end in one equilibrium, and how the cell contracts there."""
    return [
        {
            "model": result.model,
            "seed": str(result.seed),
            "distance of the two solutions, median": number(result.two_starts.median_distance, ".1e"),
            "distance, largest": number(result.two_starts.max_distance, ".1e"),
            "nats per token from its own start": number(result.two_starts.nats_per_token, ".5f"),
            "from a random state": number(result.two_starts.other_nats_per_token, ".5f"),
            "spectral radius, median": number(result.contraction[-1].median_spectral_radius, ".3f"),
            "spectral radius, largest": number(result.contraction[-1].max_spectral_radius, ".3f"),
        }
        for result in results
    ]


def budget_rows(results: Sequence[ConvergenceResult]) -> list[Row]:
    """The loss by the model's own solver, which comes first in a result."""
    losses = [
        {
            point.num_evaluations: point.nats_per_token
            for point in result.budgets
            if point.solver == result.budgets[0].solver
        }
        for result in results
    ]
    budgets = sorted({budget for loss in losses for budget in loss})
    return [
        {"model": result.model, "seed": str(result.seed)}
        | {str(budget): number(loss.get(budget), ".5f") for budget in budgets}
        for result, loss in zip(results, losses, strict=True)
    ]


def gradient_rows(results: Sequence[ConvergenceResult]) -> list[Row]:
    """How far gradients are from the exact one."""
    return [
        {
            "model": result.model,
            "seed": str(result.seed),
            "gradient": error.gradient,
            "evaluations": number(error.evaluations, ".1f"),
            "residual, median": number(error.residual, ".1e"),
            "adjoint evaluations": number(error.adjoint_evaluations, ".1f"),
            "adjoint residual, median": number(error.adjoint_residual, ".1e"),
            "relative error": number(error.relative_error, ".2%"),
            "cosine": number(error.cosine, ".4f"),
        }
        for result in results
        for error in result.gradients
    ]


def guarantee_rows(results: Sequence[ConvergenceResult]) -> list[Row]:
    """What is certified of a cell that has guarantees, beside the worst that was measured."""
    return [
        {
            "model": result.model,
            "seed": str(result.seed),
            "splitting": guarantee.splitting,
            "margin m": number(guarantee.margin, ".3f"),
            "margin, smallest measured": number(guarantee.measured_margin, ".3f"),
            "L": number(guarantee.lipschitz, ".3f"),
            "certified rate": number(guarantee.certified_rate, ".4f"),
            "to a residual of": f"{guarantee.rtol:g}",
            "certified steps": number(guarantee.certified_steps, ",d"),
            "steps of the slowest solve": number(guarantee.most_steps, ",d"),
            "largest share of its certified steps": number(guarantee.largest_share, ".1%"),
        }
        for result in results
        for guarantee in result.guarantees
    ]
