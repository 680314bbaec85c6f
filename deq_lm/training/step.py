"""One step of training: the gradient of consecutive segments, what is wrong with it, and the update or none."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from deq_lm.cells.memory import Memory
from deq_lm.data.streams import Segment
from deq_lm.modeling.builders import build_adjoint, build_stopping
from deq_lm.solvers import Solution
from deq_lm.training import sharding
from deq_lm.training.faults import RETRY_BUDGET, Policy, find_faults, nan_as_inf, sternest_policy, worst_solve
from deq_lm.training.phases import StepPlan, plan_step
from deq_lm.training.recipe import Recipe
from deq_lm.training.state import TrainingState

START_WEIGHT = 1.0e-2
"""Of the learned start's regression in the loss. How fast it learns does not depend on it, since Adam divides a gradient
by its size; but the smaller, the less it counts in the norm by which the gradient of all parameters is clipped."""

MEMORY_OF_LOSS = 10
"""Steps that the running mean of the loss goes back over, against which a spike is seen."""


@dataclass(frozen=True)
class StepResult:
    """One step as every process sees it.

    Attributes:
        grad_norm: global norm of the gradient before clipping.
        faults: see `find_faults`; of a step that was computed twice, the second time.
        policy: what became of it.
        records: of each time it had faults that are not ignored, what is to be kept of them.
        interrupted: whether a process has been asked to stop.
    """

    grad_norm: float
    faults: Mapping[str, float | None]
    policy: Policy
    records: Sequence[Mapping[str, Any]]
    interrupted: bool


def train_step(
    accelerator: Accelerator, model: nn.Module, state: TrainingState, recipe: Recipe, *, stop_requested: bool
) -> StepResult:
    """One update of the weights from `gradient_accumulation` consecutive segments of every stream, unless faults forbid it.

    The host waits for the device once, for all numbers together; besides, the solves, forward and backward, ask every
    `stopping.check_every` steps whether they are done, and an adaptive softmax once a segment where its targets lie.
    """
    settings, progress, interval = recipe.training, state.progress, state.interval
    start = time.perf_counter()
    taught = settings.distillation
    if taught is not None and progress.step >= taught.num_taught_steps(settings.num_schedule_steps):
        state.teacher = state.teacher_memory = None  # what they held on the device is free
    stopping = build_stopping(state.model.config.stopping, "model.stopping")
    plan = plan_step(
        progress.step,
        phases=settings.phases,
        num_steps=settings.num_schedule_steps,
        stopping=stopping,
        jitter=settings.max_steps_jitter,
        jacobian=settings.jacobian,
    )
    place = state.streams.state_dict()
    segments = [state.streams.next_segment() for _ in range(settings.gradient_accumulation)]
    records = []
    for may_retry in (True, False):
        gradient = compute_gradient(accelerator, model, state, recipe, plan, segments, stop_requested=stop_requested)
        faults = find_faults(
            settings.faults,
            finite=gradient.finite,
            nats_per_token=gradient.nll_nats / gradient.num_targets,
            mean_nats_per_token=progress.mean_nats_per_token,
            solver_residual=gradient.solver_residual,
            adjoint_residual=gradient.adjoint_residual,
        )
        policy = sternest_policy(settings.faults, faults, may_retry=may_retry)
        if policy != "ignore":
            own = worst_solve(gradient.solves, rank=accelerator.process_index, num_streams=len(segments[0].input_ids))
            worst = max(gather_object([own]), key=lambda solve: solve.residual)
            records.append({"faults": faults, "policy": policy, **place, "worst_solve": worst.to_mapping()})
        if policy != "retry":
            break
        state.optimizer.zero_grad()
        for account in (progress.account, interval.account):
            account.num_retried += 1
        if state.model.config.depth == "equilibrium":
            adjoint = build_adjoint(state.model.config.adjoint, "model.adjoint")
            plan = plan.with_budget(RETRY_BUDGET, stopping, adjoint)

    progress.step += 1
    progress.num_tokens += gradient.num_targets
    updates = gradient.finite and policy in ("ignore", "warn")
    for account in (progress.account, interval.account):
        account.count(faults, updated=updates)
    state.memory = gradient.memory if gradient.finite else None  # what was not finite would be carried on
    state.teacher_memory = gradient.teacher_memory
    if gradient.finite:
        interval.nll_nats += gradient.nll_nats
        interval.num_targets += gradient.num_targets
        nats, mean = gradient.nll_nats / gradient.num_targets, progress.mean_nats_per_token
        progress.mean_nats_per_token = nats if mean is None else mean + (nats - mean) / MEMORY_OF_LOSS
    if updates:
        state.optimizer.step()
    progress.num_skipped_in_a_row = 0 if updates else progress.num_skipped_in_a_row + 1
    state.optimizer.zero_grad()
    with nullcontext() if updates else warnings.catch_warnings():
        if not updates:  # PyTorch takes a first step without an update for a mistake; here the rate is the step's
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        state.schedule.step()
    for name, values in gradient.solves.items():
        getattr(interval, name).extend(values)
    interval.num_steps += 1
    interval.seconds += time.perf_counter() - start
    return StepResult(gradient.grad_norm, faults, policy, records, gradient.interrupted)


@dataclass(frozen=True)
class Gradient:
    """What a step has computed before its update; the gradient itself is with the weights.

    Attributes:
        memory, teacher_memory: after the last segment.
        nll_nats, num_targets: over all processes.
        grad_norm: global norm before clipping.
        finite: whether loss and gradient are, on every process.
        solver_residual, adjoint_residual: largest of all solves of all processes, inf for NaN; 0 without any.
        solves: of this process, by the names of `Interval`.
        interrupted: whether a process has been asked to stop.
    """

    memory: Memory | None
    teacher_memory: Memory | None
    nll_nats: float
    num_targets: int
    grad_norm: float
    finite: bool
    solver_residual: float
    adjoint_residual: float
    solves: Mapping[str, list[float]]
    interrupted: bool


def compute_gradient(
    accelerator: Accelerator,
    model: nn.Module,
    state: TrainingState,
    recipe: Recipe,
    plan: StepPlan,
    segments: Sequence[Segment],
    *,
    stop_requested: bool,
) -> Gradient:
    """Forward and backward passes of a step, and what is to be known of them on all processes.

    The loss is a sum of

    - the nats of all processes and segments, divided once by the number of their targets;
    - likewise the distillation's term, while there is a teacher;
    - the Jacobian's estimate, its sum over the segments that are regularized divided by the number of all segments;
    - a learned start's error, its mean over the segments.
    """
    settings = recipe.training
    teacher = state.teacher
    # Streams are equally long and without padding, so every process has as many targets as this one.
    num_targets = accelerator.num_processes * sum(segment.targets.numel() for segment in segments)
    jacobian = settings.jacobian if plan.jacobian_weight else None
    nll_nats = torch.zeros((), device=accelerator.device)
    memory, measured = state.memory, dict[str, list[Tensor]]()
    teacher_memory = state.teacher_memory
    for i, segment in enumerate(segments):
        # between segments nothing is exchanged; the last backward pass averages the gradient over the processes
        regularize = jacobian is not None and random.random() < jacobian.probability  # noqa: S311
        with nullcontext() if i == len(segments) - 1 else accelerator.no_sync(model):
            input_ids = segment.input_ids.to(accelerator.device)
            output = model(
                input_ids,
                targets=segment.targets.to(accelerator.device),
                memory=None if segment.is_start else memory,
                estimate_jacobian=regularize,
                power_iterations=None if jacobian is None or not regularize else jacobian.power_iterations,
                return_logits=teacher is not None,
                **plan.arguments(),
            )
            loss = output.nll_nats * (accelerator.num_processes / num_targets)
            if regularize:
                loss = loss + output.jacobian * (plan.jacobian_weight / len(segments))
            if output.start_error is not None:
                loss = loss + output.start_error * (START_WEIGHT / len(segments))
            if teacher is not None:
                with accelerator.autocast():
                    term, teacher_memory = teacher.term(
                        output.logits, input_ids, None if segment.is_start else teacher_memory
                    )
                loss = loss + term * (accelerator.num_processes / num_targets)
            accelerator.backward(loss)
        memory = output.memory
        nll_nats = nll_nats + output.nll_nats.detach()
        if plan.num_unrolled_steps is None:
            solves = {"solver": output.solution, "adjoint": state.model.adjoint_solution}
            for name, solution in solves.items():
                if solution is not None:
                    for fact, values in facts_of(solution, unrolled=state.model.config.depth == "unrolled").items():
                        measured.setdefault(f"{name}_{fact}", []).append(values)

    norm = accelerator.clip_grad_norm_(model.parameters(), settings.clip_norm or float("inf"))
    assert isinstance(norm, Tensor)
    norm = sharding.whole(norm)
    not_finite = ~(torch.isfinite(nll_nats) & torch.isfinite(norm))
    facts = torch.stack([nll_nats, not_finite.to(nll_nats), torch.full_like(nll_nats, stop_requested)])
    largest = nll_nats.new_zeros(2, accelerator.num_processes)  # a place for each process, so that their sum holds all
    judged = ("solver", "adjoint") if state.model.config.depth == "equilibrium" else ()
    for row, name in zip(largest, judged, strict=False):
        if f"{name}_residuals" in measured:
            row[accelerator.process_index] = torch.cat(measured[f"{name}_residuals"]).max()  # NaN, if there is one
    # What becomes of the step is decided by all processes alike, from sums; the norm is that of all of them already.
    total = cast(Tensor, accelerator.reduce(torch.cat([facts, largest.flatten()]), "sum"))
    pooled = {name: torch.cat(tensors).to(total) for name, tensors in measured.items()}
    numbers = iter(torch.cat([total, norm.to(total)[None], *pooled.values()]).tolist())  # the wait for the device
    total_nats, num_not_finite, num_stops = islice(numbers, 3)
    solver_residual, adjoint_residual = (
        max(map(nan_as_inf, islice(numbers, accelerator.num_processes))) for _ in range(2)
    )
    grad_norm = next(numbers)
    solves = {name: list(islice(numbers, len(values))) for name, values in pooled.items()}
    return Gradient(
        memory=memory,
        teacher_memory=teacher_memory,
        nll_nats=total_nats,
        num_targets=num_targets,
        grad_norm=grad_norm,
        finite=num_not_finite == 0,
        solver_residual=solver_residual,
        adjoint_residual=adjoint_residual,
        solves=solves,
        interrupted=num_stops > 0,
    )


def facts_of(solution: Solution, *, unrolled: bool) -> dict[str, Tensor]:
    """What an `Interval` keeps of a solve, or of the evaluations of an unrolled model, (B,) each."""
    facts = {"evaluations": solution.num_evaluations, "residuals": solution.relative_residual}
    return facts if unrolled else {**facts, "outcomes": solution.outcome, "fallbacks": solution.used_fallback}
