"""Score the tokens of a split: nats summed over every target, memory carried from segment to segment."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from deq_lm.data.streams import IGNORED, ContiguousStreams, Segment
from deq_lm.evaluation.config import EvaluationConfig
from deq_lm.evaluation.modes import device_of, measuring
from deq_lm.modeling import DEQLMForCausalLM
from deq_lm.solvers import Outcome, Solution, StoppingRule


@dataclass(frozen=True, kw_only=True)
class SolveStatistics:
    """The forward solves behind a number; one solve is one segment of one stream.

    Attributes:
        outcomes: how many solves ended how, by the lower-case name of `Outcome`.
        mean_evaluations: evaluations of the cell per solve.
        max_evaluations: the most in one solve.
        median_residual: of the relative residuals ||f(z) - z|| / ||f(z)||; None where it is not finite, also below.
        residual_95: their 95 % quantile.
        max_residual: the largest.
    """

    outcomes: Mapping[str, int]
    mean_evaluations: float
    max_evaluations: int
    median_residual: float | None
    residual_95: float | None
    max_residual: float | None

    @property
    def num_solves(self) -> int:
        return sum(self.outcomes.values())

    @property
    def share_converged(self) -> float:
        """In [0, 1]."""
        return self.outcomes.get("converged", 0) / self.num_solves


@dataclass(frozen=True)
class TokenLoss:
    """What scoring tokens gives.

    Attributes:
        nll_nats: the sum of -log p over the targets.
        num_targets: how many were scored.
        solves: the forward solves; None if the model has none.
    """

    nll_nats: float
    num_targets: int
    solves: SolveStatistics | None


@dataclass
class _Sums:
    """What one process has counted."""

    nll_nats: float = 0.0
    num_targets: int = 0
    outcomes: list[int] = field(default_factory=list)
    evaluations: list[int] = field(default_factory=list)
    residuals: list[float] = field(default_factory=list)

    def add_solves(self, solution: Solution, scored: Tensor) -> None:
        """`scored`, (B,) bool: streams of this segment that have targets; the others have ended, and are padding."""
        self.outcomes += solution.outcome[scored].tolist()
        self.evaluations += solution.num_evaluations[scored].tolist()
        self.residuals += solution.relative_residual[scored].tolist()


def score_tokens(
    model: DEQLMForCausalLM,
    tokens: np.ndarray,
    config: EvaluationConfig,
    accelerator: Accelerator | None = None,
    *,
    stopping: StoppingRule | None = None,
) -> TokenLoss:
    """The loss of a language model on one token array.

    Args:
        model: not wrapped; left as it was found.
        tokens: 1-D; tokens[0] is context only, all others are targets.
        config: streams, segments, and how many segments at most.
        accelerator: of a run in several processes; each scores its own streams, and all get the sum.
        stopping: instead of the model's rule.

    Raises:
        ConfigError: batch_size cannot be divided among the processes.
    """
    streams = ContiguousStreams(
        tokens,
        num_streams=config.batch_size,
        segment_length=config.segment_length,
        rank=0 if accelerator is None else accelerator.process_index,
        num_ranks=1 if accelerator is None else accelerator.num_processes,
        drop_remainder=False,
    )
    device = device_of(model)
    sums, memory = _Sums(), None
    with measuring(model):
        for segment in islice(streams, config.max_segments):
            input_ids, targets = (tensor.to(device) for tensor in without_padding(segment))
            output = model(input_ids, targets=targets, memory=memory, stopping=stopping, return_logits=False)
            memory = output.memory
            sums.nll_nats += output.nll_nats.item()
            sums.num_targets += int(output.num_targets)
            if output.solution is not None:
                sums.add_solves(output.solution, (targets != IGNORED).any(dim=1))
    return _total([sums] if accelerator is None else gather_object([sums]))


def without_padding(segment: Segment) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a segment, (b, L) each, cut after the last target of any stream; L is 1 at least."""
    length = max(1, int((segment.targets != IGNORED).sum(dim=1).max()))
    return segment.input_ids[:, :length], segment.targets[:, :length]


def _total(parts: list[_Sums]) -> TokenLoss:
    return TokenLoss(
        nll_nats=math.fsum(part.nll_nats for part in parts),
        num_targets=sum(part.num_targets for part in parts),
        solves=_statistics(parts) if any(part.outcomes for part in parts) else None,
    )


def _statistics(parts: list[_Sums]) -> SolveStatistics:
    outcomes = Counter(Outcome(code).name.lower() for part in parts for code in part.outcomes)
    evaluations = [count for part in parts for count in part.evaluations]
    residuals = np.array([value for part in parts for value in part.residuals])
    residuals = np.where(np.isfinite(residuals), residuals, np.inf)  # a failed solve is worse than any other
    median, upper, largest = np.quantile(residuals, (0.5, 0.95, 1.0), method="higher").tolist()
    return SolveStatistics(
        outcomes=dict(outcomes),
        mean_evaluations=sum(evaluations) / len(evaluations),
        max_evaluations=max(evaluations),
        median_residual=finite(median),
        residual_95=finite(upper),
        max_residual=finite(largest),
    )


def finite(value: float) -> float | None:
    """The value, or None if it is infinite or NaN, which JSON cannot hold."""
    return value if math.isfinite(value) else None
