"""Time and floating-point operations of training and of scoring, the models in turns, in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from deq_lm.cells.memory import Memory
from deq_lm.data.encoding import EncodedCorpus
from deq_lm.data.streams import IGNORED, ContiguousStreams, Segment
from deq_lm.errors import DataError
from deq_lm.evaluation.modes import measuring
from deq_lm.evaluation.records import Record, provenance
from deq_lm.modeling import DEQLMForCausalLM
from deq_lm.modeling.modeling_deq_lm import DEQLMOutput
from deq_lm.structure import to_mapping
from deq_lm.suites.config import CostSettings
from deq_lm.suites.subjects import Subject
from deq_lm.suites.training_step import RepeatedStep, steady
from deq_lm.training.phases import PhaseConfig, stretches
from deq_lm.training.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """What one trained model costs per step at the end of its training, and per segment when it scores text.

    Training is an expectation over steps with and without regularization, which go by chance.

    Attributes:
        model: its name in the suite.
        depth: "equilibrium", "unrolled" or "stack".
        training_seconds: of a step, median.
        training_flops_per_token: matrix products, forward and backward (`torch.utils.flop_counter`).
        training_evaluations: of the cell in a forward solve, mean; None without a solve.
        adjoint_evaluations: in an adjoint solve, likewise.
        training_flops: of the whole run, per token trained on: the phases before the last cost less.
        inference_seconds: of a segment of all streams, median.
        inference_flops_per_token: likewise.
        inference_evaluations: mean in a solve; None without one.
    """

    model: str
    depth: str
    training_seconds: float
    training_flops_per_token: float
    training_evaluations: float | None
    adjoint_evaluations: float | None
    training_flops: float
    inference_seconds: float
    inference_flops_per_token: float
    inference_evaluations: float | None


@dataclass(frozen=True, kw_only=True)
class CostResult(Record):
    """Costs of several models, timed in turns.

    Attributes:
        suite: its name.
        settings: how it was measured.
        device: "cpu", "cuda".
        recipes: of each model, by its name.
        rows: the models; the first is what times are compared with.
    """

    kind: ClassVar[str] = "cost"

    suite: str
    settings: CostSettings
    device: str
    recipes: Mapping[str, Mapping[str, Any]]
    rows: tuple[ModelCost, ...]


def measure_cost(suite: str, subjects: Sequence[Subject], settings: CostSettings, device: torch.device) -> CostResult:
    """Time `rounds` steps of every model in turns, and count the operations of as many.

    Args:
        suite: its name, for the record.
        subjects: trained; of each model name the first is measured.
        settings: how often.
        device: where.

    Raises:
        CheckpointError: a model is not trained.
        DataError: the text is too short.
    """
    firsts = list({subject.name: subject for subject in reversed(subjects)}.values())[::-1]
    meters = [_ModelMeter(subject, device) for subject in firsts]
    for meter in meters:
        meter.warm_up()
    for _ in range(settings.rounds):
        for meter in meters:
            meter.time()
    return CostResult(
        **provenance(),
        suite=suite,
        settings=settings,
        device=device.type,
        recipes={subject.name: to_mapping(subject.recipe) for subject in firsts},
        rows=tuple(meter.result(settings.rounds) for meter in meters),
    )


class _ModelMeter:
    """One model: its steps in each phase of training, of which the last is timed, and its scoring."""

    def __init__(self, subject: Subject, device: torch.device) -> None:
        self._subject, self._device = subject, device
        recipe, corpus = subject.recipe, subject.corpus()
        training, tokens = recipe.training, corpus.splits["train"].tokens
        needed = 2 * training.batch_size * training.segment_length * training.gradient_accumulation
        if len(tokens) <= needed:
            raise DataError(f"{subject.name}: {len(tokens):,} tokens to train on; {needed:,} are needed for two steps.")

        def steps(phase: PhaseConfig | None) -> _Steps:
            def make(regularize: bool) -> RepeatedStep:
                repeated = steady(recipe, regularize=regularize, phase=phase)
                return RepeatedStep(repeated, subject.trained(device), tokens)

            is_solved = phase is None or (phase.num_unrolled_steps is None and phase.regularize)
            if training.jacobian is None or not is_solved or steady(recipe, regularize=True).training.jacobian is None:
                return _Steps(make(False))
            return _Steps(make(False), make(True), training.jacobian.probability)

        self._phases = [
            ((min(end, training.max_steps) - start) / training.max_steps, steps(phase))
            for start, end, phase in stretches(training.phases, training.num_schedule_steps)
            if min(end, training.max_steps) > start
        ]
        self._last = self._phases[-1][1]
        self._scoring = _Scoring(subject.trained(device), recipe, corpus)
        self._scoring_seconds: list[float] = []

    def warm_up(self) -> None:
        for _ in range(2):
            self._last.time(self._device)
            self._scoring.run()
        self._last.clear()

    def time(self) -> None:
        self._last.time(self._device)
        self._scoring_seconds.append(_seconds(self._scoring.run, self._device))

    def result(self, rounds: int) -> ModelCost:
        training = self._subject.recipe.training
        targets = training.batch_size * training.segment_length * training.gradient_accumulation
        flops = [(share, steps.flops(rounds) / targets) for share, steps in self._phases]
        return ModelCost(
            model=self._subject.name,
            depth=self._subject.recipe.model_config.depth,
            training_seconds=self._last.seconds(),
            training_flops_per_token=flops[-1][1],
            training_evaluations=self._last.plain.mean_evaluations("solver"),
            adjoint_evaluations=self._last.plain.mean_evaluations("adjoint"),
            training_flops=sum(share * count for share, count in flops),
            inference_seconds=statistics.median(self._scoring_seconds),
            inference_flops_per_token=count_flops(self._scoring.run) / self._scoring.num_tokens,
            inference_evaluations=self._scoring.mean_evaluations,
        )


class _Steps:
    """Training steps of one phase, and what one costs on average if some are regularized."""

    def __init__(self, plain: RepeatedStep, regularized: RepeatedStep | None = None, probability: float = 0.0) -> None:
        self.plain = plain
        self._kinds = [(1 - probability, plain, [])]
        if regularized is not None:
            self._kinds.append((probability, regularized, []))

    def time(self, device: torch.device) -> None:
        for _, step, seconds in self._kinds:
            seconds.append(_seconds(step.run, device))

    def clear(self) -> None:
        for _, _, seconds in self._kinds:
            seconds.clear()

    def seconds(self) -> float:
        return sum(share * statistics.median(seconds) for share, _, seconds in self._kinds)

    def flops(self, num_steps: int) -> float:
        return sum(
            share * statistics.fmean(count_flops(step.run) for _ in range(num_steps)) for share, step, _ in self._kinds
        )


class _Scoring:
    """Scoring one segment of the evaluation's streams, with the memory of the one before."""

    def __init__(self, model: DEQLMForCausalLM, recipe: Recipe, corpus: EncodedCorpus) -> None:
        config = recipe.evaluation
        streams = ContiguousStreams(
            corpus.splits["test"].tokens,
            num_streams=config.batch_size,
            segment_length=config.segment_length,
            rank=0,
            num_ranks=1,
            drop_remainder=False,
        )
        first, self._segment = streams.next_segment(), streams.next_segment()
        self._model, self._device = model, next(model.parameters()).device
        self._memory: Memory | None = None
        self._memory = self._forward(first).memory
        self.num_tokens = int((self._segment.targets != IGNORED).sum())
        self.mean_evaluations: float | None = None

    def run(self) -> None:
        output = self._forward(self._segment)
        if output.solution is not None and self._model.config.depth == "equilibrium":
            self.mean_evaluations = output.solution.num_evaluations.float().mean().item()

    def _forward(self, segment: Segment) -> DEQLMOutput:
        with measuring(self._model):
            return self._model(
                segment.input_ids.to(self._device),
                targets=segment.targets.to(self._device),
                memory=self._memory,
                return_logits=False,
            )


def count_flops(run: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products in `run`; two a multiplication with addition."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # fused kernels are not all counted
        run()
    return counter.get_total_flops()


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
