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
        document_nats: the sum over the scored targets of each document; of one where documents were not given.
    """

    nll_nats: float
    num_targets: int
    solves: SolveStatistics | None
    document_nats: tuple[float, ...]


@dataclass
class _Sums:
    """What one process has counted."""

    num_targets: int = 0
    pieces: list[tuple[int, float]] = field(default_factory=list)  # document, nats
    outcomes: list[int] = field(default_factory=list)
    evaluations: list[int] = field(default_factory=list)
    residuals: list[float] = field(default_factory=list)

    def add_nats(self, segment: Segment, target_nats: Tensor, ends: np.ndarray) -> None:
        """Sum the nats, (b, L), over what each document has in each stream of the segment.

        These pieces do not depend on which process has the stream, and no later sum of them rounds.
        """
        lengths = (segment.targets != IGNORED).sum(dim=1).tolist()
        for first, length, nats in zip(segment.first_targets, lengths, target_nats.double().cpu().numpy(), strict=True):
            start = first
            while start < first + length:
                document = int(np.searchsorted(ends, start, side="right"))
                end = min(int(ends[document]), first + length)
                self.pieces.append((document, float(nats[start - first : end - first].sum())))
                start = end
            self.num_targets += length

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
    document_ends: np.ndarray | None = None,
) -> TokenLoss:
    """The loss of a language model on one token array.

    Args:
        model: not wrapped; left as it was found.
        tokens: 1-D; tokens[0] is context only, all others are targets.
        config: streams, segments, and how many segments at most.
        accelerator: of a run in several processes; each scores its own streams, and all get the sum.
        stopping: instead of the model's rule.
        document_ends: the target after the last of each document, (D,), rising to the number of targets; None is one.

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
    ends = np.array([len(tokens) - 1]) if document_ends is None else document_ends
    assert ends[-1] == len(tokens) - 1, f"documents of {ends[-1]} targets in a text of {len(tokens) - 1}"
    with measuring(model):
        for segment in islice(streams, config.max_segments):
            input_ids, targets = (tensor.to(device) for tensor in without_padding(segment))
            output = model(
                input_ids,
                targets=targets,
                memory=memory,
                stopping=stopping,
                return_logits=False,
                return_target_nats=True,
            )
            memory = output.memory
            sums.add_nats(segment, output.target_nats, ends)
            if output.solution is not None:
                sums.add_solves(output.solution, (targets != IGNORED).any(dim=1))
    return _total([sums] if accelerator is None else gather_object([sums]), len(ends))


def without_padding(segment: Segment) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a segment, (b, L) each, cut after the last target of any stream; L is 1 at least."""
    length = max(1, int((segment.targets != IGNORED).sum(dim=1).max()))
    return segment.input_ids[:, :length], segment.targets[:, :length]


def _total(parts: list[_Sums], num_documents: int) -> TokenLoss:
    pieces: list[list[float]] = [[] for _ in range(num_documents)]
    for part in parts:
        for document, nats in part.pieces:
            pieces[document].append(nats)
    return TokenLoss(
        nll_nats=math.fsum(nats for part in parts for _, nats in part.pieces),
        num_targets=sum(part.num_targets for part in parts),
        solves=_statistics(parts) if any(part.outcomes for part in parts) else None,
        document_nats=tuple(map(math.fsum, pieces)),
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
