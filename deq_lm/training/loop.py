"""The training story in reading order: set up, step, log, evaluate, save, report.

Data and schedule are not handed to Accelerate. Its data loader deals batches out in turn, so that a process would
never see two consecutive segments of one text and memory would mean nothing; here each process owns whole streams. Its
scheduler would step once per process.
"""

from __future__ import annotations

import logging
import random
import signal
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

from deq_lm.cells.memory import Memory
from deq_lm.data.encoding import EncodedCorpus, prepare
from deq_lm.data.streams import ContiguousStreams, Segment
from deq_lm.errors import CheckpointError, ConfigError
from deq_lm.evaluation import PerplexityResult, evaluate, evaluate_perplexity, render, write_record
from deq_lm.modeling import DEQLMForCausalLM, build_config
from deq_lm.modeling.builders import build_adjoint, build_stopping
from deq_lm.modeling.configuration_deq_lm import ModelSettings
from deq_lm.solvers import Solution
from deq_lm.structure import to_mapping
from deq_lm.training import checkpoint, sharding
from deq_lm.training.checkpoint import Identity, TrainingState
from deq_lm.training.durable import begin_folder, publish_folder
from deq_lm.training.faults import (
    RETRY_BUDGET,
    Policy,
    describe_account,
    describe_faults,
    find_faults,
    give_up,
    nan_as_inf,
    sternest_policy,
    worst_solve,
)
from deq_lm.training.optimizer import make_optimizer
from deq_lm.training.phases import StepPlan, comparable_phases, plan_step, stretches
from deq_lm.training.process import StopSignal, check_processes
from deq_lm.training.recipe import Recipe
from deq_lm.training.run_folder import RunFolder
from deq_lm.training.schedules import make_schedule
from deq_lm.training.tracking import Interval, Tracker, summarize

logger = logging.getLogger(__name__)

BFLOAT16_FLOOR = 2.0**-8
"""The relative residual at which bfloat16's rounding, of 8 bits, ends a solve: measured, 2e-3 to 4e-3."""

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


def train(recipe: Recipe, *, resume: bool = False) -> int | None:
    """Train, evaluate and report one run, in as many processes as the launcher has started.

    Args:
        recipe: what to do.
        resume: continue from the newest complete checkpoint in the run folder, or from the start if there is none.

    Returns:
        None at the end of the run; the number of the signal (SIGINT, SIGTERM) that made it stop early, after a
        checkpoint of the step at hand.

    Raises:
        ConfigError, DataError, CheckpointError: before anything is written.
        FloatingPointError: loss or gradient were not finite, or the loss jumped, so often or once, as the recipe says.
        SolveError: a solve did not converge, likewise.
    """
    with ExitStack() as held:
        return _train(recipe, resume, held)


def _train(recipe: Recipe, resume: bool, held: ExitStack) -> int | None:
    """`train`; what has to be released at its end, however that comes, is held by `held`."""
    settings = recipe.training
    accelerator = Accelerator(mixed_precision=settings.mixed_precision)
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ConfigError(
            f"mixed precision {accelerator.mixed_precision}, from accelerate launch or its configuration: expected no or "
            "bf16, which has the range of float32 and needs no scaled loss. Give --mixed_precision bf16, or the recipe "
            "training.mixed_precision=bf16."
        )
    check_processes(accelerator.num_processes)
    if recipe.evaluation.batch_size % accelerator.num_processes:
        raise ConfigError(
            f"evaluation.batch_size={recipe.evaluation.batch_size} cannot be shared out evenly among "
            f"{accelerator.num_processes} processes, each of which scores whole streams. Make it a multiple."
        )
    if accelerator.mixed_precision == "bf16":
        warn_of_precision_floor(recipe)
    disable_progress_bar()  # the library's, for every save; a run has its own
    run = RunFolder(Path(settings.output_dir))
    run.check(resume=resume)
    accelerator.wait_for_everyone()  # all have looked before the first one writes

    # data: each process owns whole streams
    with accelerator.main_process_first():
        corpus = prepare(recipe.data)
    streams = ContiguousStreams(
        corpus.splits["train"].tokens,
        num_streams=settings.batch_size,
        segment_length=settings.segment_length,
        rank=accelerator.process_index,
        num_ranks=accelerator.num_processes,
        drop_remainder=True,
    )

    # model: the same initial weights everywhere, then different dropout masks
    set_seed(recipe.seed)
    model = DEQLMForCausalLM(build_config(recipe.model, vocab_size=len(corpus.tokenizer)))
    set_seed(recipe.seed, device_specific=True)
    optimizer = make_optimizer(model, settings.optimizer)
    schedule = make_schedule(optimizer, settings.schedule, max_steps=settings.max_steps)
    wrapped, optimizer = sharding.prepare(accelerator, model, optimizer)

    state = TrainingState(model, optimizer, schedule, streams)
    identity = Identity(
        recipe=to_mapping(recipe),
        model_config=comparable_config(model),
        data_fingerprint=corpus.fingerprint,
        num_processes=accelerator.num_processes,
        phases=comparable_phases(settings.phases, settings.num_schedule_steps),
    )
    lock(run, accelerator, held)
    newest = checkpoint.newest_complete(run.checkpoints) if resume else None
    if newest is not None:
        checkpoint.restore(newest, state, identity, rank=accelerator.process_index)
    progress = state.progress
    if progress.step > settings.max_steps:
        raise ConfigError(
            f"training.max_steps={settings.max_steps}: {newest} is of step {progress.step} already; give at least that."
        )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        run.open(recipe, step=progress.step)

    tracker = Tracker(
        run,
        step=progress.step,
        max_steps=settings.max_steps,
        tensorboard=settings.track,
        enabled=accelerator.is_main_process,
    )
    with tracker, StopSignal() as stop:
        tracker.say(describe(recipe, corpus, model, accelerator, newest))
        while progress.step < settings.max_steps:
            lr = schedule.get_last_lr()[0]
            result = train_step(accelerator, wrapped, state, recipe, stop_requested=stop.number is not None)
            tracker.advance()
            for record in result.records:
                tracker.record(progress.step, "fault", record)
            if "not_finite" in result.faults:
                tracker.say(f"step {progress.step}: loss or gradient not finite; update skipped, memory dropped")
            give_up(progress.step, settings.faults, result.faults, num_skipped_in_a_row=progress.num_skipped_in_a_row)
            if is_due(progress.step, settings.log_every):
                metrics = summarize(gather_object([state.interval]))
                grad_norm = None if "not_finite" in result.faults else result.grad_norm
                tracker.log(progress.step, "train", {**metrics, "lr": lr, "grad_norm": grad_norm})
                interval = state.interval
                for line in describe_faults(progress.step, settings.faults, interval.account, interval.num_steps):
                    tracker.say(line)
                state.interval = Interval()
            is_best = False
            if is_due(progress.step, settings.evaluate_every):
                is_best = progress.is_best(validate(accelerator, model, corpus, recipe, tracker, progress.step))
            last = progress.step == settings.max_steps
            if last or is_best or result.interrupted or is_due(progress.step, settings.checkpoint_every):
                checkpoint.save(
                    run.checkpoints, state, identity, corpus.tokenizer, accelerator, keep=settings.keep_checkpoints
                )
            if result.interrupted and not last:
                tracker.say(f"stopped at step {progress.step}, checkpoint saved; continue with --resume")
                return stop.number or signal.SIGTERM
        tracker.record(progress.step, "faults", to_mapping(progress.account))
        tracker.say(describe_account(progress.account, progress.step))
        final_report(accelerator, model, corpus, recipe, run, tracker)
    return None


def lock(run: RunFolder, accelerator: Accelerator, held: ExitStack) -> None:
    """Keep other runs out of the run folder until `held` ends.

    Raises:
        CheckpointError: another run is in it, on all processes.
    """
    problem = None
    if accelerator.is_main_process:
        try:
            held.enter_context(run.locked())
        except CheckpointError as error:
            problem = str(error)
    problem = gather_object([problem])[0]
    if problem is not None:
        raise CheckpointError(problem)


def train_step(
    accelerator: Accelerator, model: nn.Module, state: TrainingState, recipe: Recipe, *, stop_requested: bool
) -> StepResult:
    """One update of the weights from `gradient_accumulation` consecutive segments of every stream, unless faults forbid it.

    The host waits for the device once, for all numbers together; besides, the solves, forward and backward, ask every
    `stopping.check_every` steps whether they are done, and an adaptive softmax once a segment where its targets lie.
    """
    settings, progress, interval = recipe.training, state.progress, state.interval
    start = time.perf_counter()
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
        memory: after the last segment.
        nll_nats, num_targets: over all processes.
        grad_norm: global norm before clipping.
        finite: whether loss and gradient are, on every process.
        solver_residual, adjoint_residual: largest of all solves of all processes, inf for NaN; 0 without any.
        solves: of this process, by the names of `Interval`.
        interrupted: whether a process has been asked to stop.
    """

    memory: Memory | None
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

    The gradient is that of (nats of all processes and segments) / (their targets): summed, and divided once. To it comes
    that of the Jacobian's estimate, a mean over the segments regularized or not.
    """
    settings = recipe.training
    # Streams are equally long and without padding, so every process has as many targets as this one.
    num_targets = accelerator.num_processes * sum(segment.targets.numel() for segment in segments)
    probability = settings.jacobian.probability if settings.jacobian is not None and plan.jacobian_weight else 0.0
    nll_nats = torch.zeros((), device=accelerator.device)
    memory, measured = state.memory, dict[str, list[Tensor]]()
    for i, segment in enumerate(segments):
        # between segments nothing is exchanged; the last backward pass averages the gradient over the processes
        regularize = probability > 0 and random.random() < probability  # noqa: S311
        with nullcontext() if i == len(segments) - 1 else accelerator.no_sync(model):
            output = model(
                segment.input_ids.to(accelerator.device),
                targets=segment.targets.to(accelerator.device),
                memory=None if segment.is_start else memory,
                estimate_jacobian=regularize,
                return_logits=False,
                **plan.arguments(),
            )
            loss = output.nll_nats * (accelerator.num_processes / num_targets)
            if regularize:
                loss = loss + output.jacobian * (plan.jacobian_weight / len(segments))
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


def warn_of_precision_floor(recipe: Recipe) -> None:
    """Log a warning for a stopping rule of training that no solve in bfloat16 can meet."""
    config = recipe.model_config
    rtol = build_stopping(config.stopping, "model.stopping").rtol
    if config.depth == "equilibrium" and rtol < BFLOAT16_FLOOR:
        logger.warning(
            "model.stopping.rtol=%g with mixed precision bf16: an evaluation in bfloat16 is exact to about %g, so that "
            "solves will stall or run out of steps. Give a rtol above it, or train in float32.",
            rtol,
            BFLOAT16_FLOOR,
        )


def validate(
    accelerator: Accelerator,
    model: DEQLMForCausalLM,
    corpus: EncodedCorpus,
    recipe: Recipe,
    tracker: Tracker,
    step: int,
) -> float | None:
    """Measure and log the validation split; its nats per token."""
    whole = sharding.whole_model(model)
    result = evaluate_perplexity(whole, corpus.splits["valid"], recipe.evaluation, accelerator)
    tracker.log(step, "valid", result.metrics())
    return result.perplexity.nats_per_token


def final_report(
    accelerator: Accelerator,
    model: DEQLMForCausalLM,
    corpus: EncodedCorpus,
    recipe: Recipe,
    run: RunFolder,
    tracker: Tracker,
) -> None:
    """Measure the test split, print the report, and write the model with its numbers to the run's `final` folder."""
    model = sharding.whole_model(model)
    result = evaluate(
        model,
        corpus,
        recipe.evaluation,
        seed=recipe.seed,
        location=str(run.path),
        recipe=to_mapping(recipe),
        accelerator=accelerator,
    )
    if result is not None:  # on the main process
        metrics = PerplexityResult(result.perplexity, result.solves).metrics()
        tracker.log(recipe.training.max_steps, "test", metrics)
        aside = begin_folder(run.final)
        model.save_pretrained(aside)
        corpus.tokenizer.save_pretrained(aside)
        write_record(aside / "evaluation.json", result)
        publish_folder(aside, run.final)
        tracker.say(f"\n{render(result)}\n\nrun folder: {run.path}")
    accelerator.wait_for_everyone()


def is_due(step: int, every: int | None) -> bool:
    """Whether something done every so many steps is to be done after `step`."""
    return every is not None and step % every == 0


def comparable_config(model: DEQLMForCausalLM) -> dict[str, Any]:
    """The model's configuration with all defaults filled in, without what the library writes about itself."""
    names = ["vocab_size", *(field.name for field in fields(ModelSettings))]
    config = {name: getattr(model.config, name) for name in names}
    return {**config, "evaluation_stopping": config["evaluation_stopping"] or config["stopping"]}


def describe(
    recipe: Recipe, corpus: EncodedCorpus, model: DEQLMForCausalLM, accelerator: Accelerator, newest: Path | None
) -> str:
    """What is about to happen, in a few lines."""
    settings = recipe.training
    ends = [
        f"{end:,}" for _, end, phase in stretches(settings.phases, settings.num_schedule_steps) if phase is not None
    ]
    tokens_per_step = settings.batch_size * settings.segment_length * settings.gradient_accumulation
    return "\n".join(
        [
            f"{recipe.name}: {model.num_parameters():,} parameters, {len(corpus.tokenizer):,} words of vocabulary, "
            f"{corpus.splits['train'].num_tokens:,} tokens of {recipe.data.corpus} to train on",
            f"{settings.max_steps:,} steps of {tokens_per_step:,} tokens on {accelerator.num_processes} process(es), "
            f"{accelerator.device.type}, mixed precision {accelerator.mixed_precision}; run folder {settings.output_dir}",
            *([f"phases end at steps {', '.join(ends)}"] if ends else []),
            "starting at step 0" if newest is None else f"resuming from {newest}",
        ]
    )
