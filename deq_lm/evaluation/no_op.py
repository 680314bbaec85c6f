"""Does the solve matter? Compare it with one evaluation of the cell from the same start and the same memory."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import numpy as np

from deq_lm.data.streams import IGNORED, ContiguousStreams
from deq_lm.evaluation.config import EvaluationConfig
from deq_lm.evaluation.modes import device_of, measuring
from deq_lm.evaluation.token_loss import finite, without_padding
from deq_lm.modeling import DEQLMForCausalLM
from deq_lm.solvers import StoppingRule


@dataclass(frozen=True, kw_only=True)
class NoOpCheck:
    """Numbers of part of a split; None is not finite.

    Attributes:
        distance: ||f(z*) - f(0)|| / ||f(z*)||, over all positions: how far the solve goes beyond one evaluation. Near 0
            the model does not use its depth.
        nats_per_token: with the solve.
        first_nats_per_token: of f(0), one evaluation.
        num_tokens: scored tokens.
    """

    distance: float | None
    nats_per_token: float | None
    first_nats_per_token: float | None
    num_tokens: int


def check_no_op(model: DEQLMForCausalLM, tokens: np.ndarray, config: EvaluationConfig) -> NoOpCheck:
    """Solve the first `config.no_op_segments` segments of every stream, and evaluate the cell once on each.

    Args:
        model: left as it was found.
        tokens: 1-D; tokens[0] is context only.
        config: streams and segments.
    """
    streams = ContiguousStreams(
        tokens, num_streams=config.batch_size, segment_length=config.segment_length, drop_remainder=False
    )
    device = device_of(model)
    solved_nats = first_nats = difference = size = 0.0
    num_tokens, memory = 0, None
    with measuring(model):
        for segment in islice(streams, config.no_op_segments):
            input_ids, targets = (tensor.to(device) for tensor in without_padding(segment))
            solved, first = (
                model(input_ids, targets=targets, memory=memory, stopping=stopping, return_logits=False)
                for stopping in (None, StoppingRule.fixed(0))
            )
            scored = targets != IGNORED  # (B, L)
            end, start = solved.solution.image[scored].double(), first.solution.image[scored].double()
            difference += (end - start).square().sum().item()
            size += end.square().sum().item()
            solved_nats += solved.nll_nats.item()
            first_nats += first.nll_nats.item()
            num_tokens += int(solved.num_targets)
            memory = solved.memory
    return NoOpCheck(
        distance=finite((difference / size) ** 0.5) if size else None,
        nats_per_token=finite(solved_nats / num_tokens),
        first_nats_per_token=finite(first_nats / num_tokens),
        num_tokens=num_tokens,
    )
