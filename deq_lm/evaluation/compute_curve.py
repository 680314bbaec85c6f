"""What each evaluation of the cell is worth at test: the loss of solves that are stopped early."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deq_lm.evaluation.config import EvaluationConfig
from deq_lm.evaluation.token_loss import finite, score_tokens
from deq_lm.modeling import DEQLMForCausalLM
from deq_lm.solvers import StoppingRule


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """The loss at one budget.

    Attributes:
        num_evaluations: of the cell, in every solve.
        nats_per_token: None if it is not finite.
        num_tokens: scored tokens.
    """

    num_evaluations: int
    nats_per_token: float | None
    num_tokens: int


def compute_curve(model: DEQLMForCausalLM, tokens: np.ndarray, config: EvaluationConfig) -> list[CurvePoint]:
    """The loss at each of `config.curve_evaluations`, on `config.max_segments` segments of every stream.

    Every solve takes all of its budget, whatever its residual, and memory comes from solves of the same budget.

    Args:
        model: an equilibrium; left as it was found.
        tokens: 1-D; tokens[0] is context only.
        config: streams, segments and budgets.
    """
    points = []
    for num_evaluations in config.curve_evaluations:
        loss = score_tokens(model, tokens, config, stopping=StoppingRule.fixed(num_evaluations - 1))
        nats = finite(loss.nll_nats / loss.num_targets)
        points.append(CurvePoint(num_evaluations=num_evaluations, nats_per_token=nats, num_tokens=loss.num_targets))
    return points
