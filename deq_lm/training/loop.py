"""The training story in reading order: set up, step, log, evaluate, save, report.

Data and schedule are not handed to Accelerate. Its data loader deals batches out in turn, so that a process would
never see two consecutive segments of one text and memory would mean nothing; here each process owns whole streams. Its
scheduler would step once per process.
"""

from __future__ import annotations

import math
import random
import signal
import time
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

from deq_lm.data.encoding import EncodedCorpus, prepare
from deq_lm.data.streams import ContiguousStreams
from deq_lm.errors import ConfigError, SolveError
from deq_lm.evaluation import PerplexityResult, evaluate, evaluate_perplexity, render, write_record
from deq_lm.modeling import DEQLMForCausalLM, build_config
from deq_lm.modeling.builders import build_stopping
from deq_lm.modeling.configuration_deq_lm import ModelSettings
from deq_lm.solvers import Solution
from deq_lm.structure import to_mapping
from deq_lm.training import checkpoint
from deq_lm.training.checkpoint import Identity, Progress, TrainingState
from deq_lm.training.durable import begin_folder, publish_folder
from deq_lm.training.optimizer import make_optimizer
from deq_lm.training.phases import comparable_phases, plan_step, stretches
from deq_lm.training.process import StopSignal, warn_of_missing_processes
from deq_lm.training.recipe import Recipe, TrainingConfig
from deq_lm.training.run_folder import RunFolder
from deq_lm.training.schedules import make_schedule
from deq_lm.training.tracking import Interval, Tracker, summarize

MAX_SKIPPED_IN_A_ROW = 10
"""Steps in a row without an update before a run gives up."""


@dataclass(frozen=True)
class StepResult:
    """One step as every process sees it.

    Attributes:
        grad_norm: global norm of the gradient before clipping.
        adjoint_residual: largest relative residual of an adjoint solve, inf for one that is not a number; 0 without any.
        finite: whether loss and gradient were finite on every process.
        unconverged: whether they were, and an adjoint solve did not converge (`UnconvergedAdjointConfig`).
        interrupted: whether a process has been asked to stop.
    """

    grad_norm: float
    adjoint_residual: float
    finite: bool
    unconverged: bool
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
        FloatingPointError: there was no update `MAX_SKIPPED_IN_A_ROW` times in a row, and the last time because loss or
            gradient were not finite.
        SolveError: the last time because an adjoint solve did not converge; or it did not once, if the recipe says so.
    """
    settings = recipe.training
    accelerator = Accelerator(mixed_precision=settings.mixed_precision)
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ConfigError(
            f"mixed precision {accelerator.mixed_precision}, from accelerate launch or its configuration: expected no or "
            "bf16, which has the range of float32 and needs no scaled loss. Give --mixed_precision bf16, or the recipe "
            "training.mixed_precision=bf16."
        )
    warn_of_missing_processes(accelerator.num_processes)
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
    wrapped, optimizer = accelerator.prepare(model, optimizer)

    state = TrainingState(model, optimizer, schedule, streams)
    identity = Identity(
        recipe=to_mapping(recipe),
        model_config=comparable_config(model),
        data_fingerprint=corpus.fingerprint,
        num_processes=accelerator.num_processes,
        phases=comparable_phases(settings.phases, settings.num_schedule_steps),
    )
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
            if not result.finite:
                tracker.say(f"step {progress.step}: loss or gradient not finite; update skipped, memory dropped")
            give_up_if_hopeless(result, progress, settings)
            if is_due(progress.step, settings.log_every):
                metrics = summarize(gather_object([state.interval]))
                grad_norm = result.grad_norm if result.finite else None
                tracker.log(progress.step, "train", {**metrics, "lr": lr, "grad_norm": grad_norm})
                if metrics["adjoint_unconverged"] and settings.unconverged_adjoint.policy != "ignore":
                    tracker.say(describe_unconverged(progress.step, state.interval, metrics, settings))
                state.interval = Interval()
            if is_due(progress.step, settings.evaluate_every):
                validate(accelerator, model, corpus, recipe, tracker, progress.step)
            last = progress.step == settings.max_steps
            if last or result.interrupted or is_due(progress.step, settings.checkpoint_every):
                checkpoint.save(
                    run.checkpoints, state, identity, corpus.tokenizer, accelerator, keep=settings.keep_checkpoints
                )
            if result.interrupted and not last:
                tracker.say(f"stopped at step {progress.step}, checkpoint saved; continue with --resume")
                return stop.number or signal.SIGTERM
        final_report(accelerator, model, corpus, recipe, run, tracker)
    return None


def train_step(
    accelerator: Accelerator, model: nn.Module, state: TrainingState, recipe: Recipe, *, stop_requested: bool
) -> StepResult:
    """One update of the weights from `gradient_accumulation` consecutive segments of every stream.

    The gradient is that of (nats of all processes and segments) / (their targets): summed, and divided once. To it comes
    that of the Jacobian's estimate, a mean over the segments regularized or not.

    The host waits for the device once, for all numbers together; besides, the solves, forward and backward, ask every
    `stopping.check_every` steps whether they are done, and an adaptive softmax once a segment where its targets lie.
    """
    settings, progress, interval = recipe.training, state.progress, state.interval
    start = time.perf_counter()
    plan = plan_step(
        progress.step,
        phases=settings.phases,
        num_steps=settings.num_schedule_steps,
        stopping=build_stopping(state.model.config.stopping, "model.stopping"),
        jitter=settings.max_steps_jitter,
        jacobian=settings.jacobian,
    )
    segments = [state.streams.next_segment() for _ in range(settings.gradient_accumulation)]
    # Streams are equally long and without padding, so every process has as many targets as this one.
    num_targets = accelerator.num_processes * sum(segment.targets.numel() for segment in segments)

    probability = settings.jacobian.probability if settings.jacobian is not None and plan.jacobian_weight else 0.0
    nll_nats = torch.zeros((), device=accelerator.device)
    measured: dict[str, list[Tensor]] = {}
    for i, segment in enumerate(segments):
        # between segments nothing is exchanged; the last backward pass averages the gradient over the processes
        regularize = probability > 0 and random.random() < probability  # noqa: S311
        with nullcontext() if i == len(segments) - 1 else accelerator.no_sync(model):
            output = model(
                segment.input_ids.to(accelerator.device),
                targets=segment.targets.to(accelerator.device),
                memory=None if segment.is_start else state.memory,
                estimate_jacobian=regularize,
                return_logits=False,
                **plan.arguments(),
            )
            loss = output.nll_nats * (accelerator.num_processes / num_targets)
            if regularize:
                loss = loss + output.jacobian * (plan.jacobian_weight / len(segments))
            accelerator.backward(loss)
        state.memory = output.memory
        nll_nats = nll_nats + output.nll_nats.detach()
        if plan.num_unrolled_steps is None:
            solves = {"solver": output.solution, "adjoint": state.model.adjoint_solution}
            for name, solution in solves.items():
                if solution is not None:
                    for fact, values in facts_of(solution, unrolled=state.model.config.depth == "unrolled").items():
                        measured.setdefault(f"{name}_{fact}", []).append(values)

    norm = accelerator.clip_grad_norm_(model.parameters(), settings.clip_norm or float("inf"))
    assert isinstance(norm, Tensor)
    not_finite = ~(torch.isfinite(nll_nats) & torch.isfinite(norm))
    facts = torch.stack([nll_nats, not_finite.to(nll_nats), torch.full_like(nll_nats, stop_requested)])
    largest = nll_nats.new_zeros(accelerator.num_processes)  # a place for each process, so that their sum holds all
    if "adjoint_residuals" in measured:
        largest[accelerator.process_index] = torch.cat(measured["adjoint_residuals"]).max()  # NaN, if there is one
    facts = torch.cat([facts, largest])
    # Skipping and stopping are decided by all processes alike, from sums; the norm is that of all of them already.
    total = cast(Tensor, accelerator.reduce(facts, "sum"))
    pooled = {name: torch.cat(tensors).to(total) for name, tensors in measured.items()}
    numbers = iter(torch.cat([total, norm.to(total)[None], *pooled.values()]).tolist())  # the wait for the device
    total_nats, num_not_finite, num_stops = islice(numbers, 3)
    adjoint_residual = max(math.inf if math.isnan(number) else number for number in islice(numbers, len(largest)))
    grad_norm = next(numbers)

    progress.step += 1
    progress.num_tokens += num_targets
    finite = num_not_finite == 0
    unconverged = finite and adjoint_residual > settings.unconverged_adjoint.residual
    if finite:
        interval.nll_nats += total_nats
        interval.num_targets += num_targets
        interval.num_unconverged += unconverged
    else:
        state.memory = None  # it came from the same pass, and would carry what was not finite on
        progress.num_skipped += 1
        interval.num_skipped += 1
    updates = finite and (settings.unconverged_adjoint.updates or not unconverged)
    if updates:
        state.optimizer.step()
        progress.num_skipped_in_a_row = 0
    else:
        progress.num_skipped_unconverged += unconverged
        progress.num_skipped_in_a_row += 1
        interval.num_skipped_unconverged += unconverged
    state.optimizer.zero_grad()
    with nullcontext() if updates else warnings.catch_warnings():
        if not updates:  # PyTorch takes a first step without an update for a mistake; here the rate is the step's
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        state.schedule.step()
    for name, values in pooled.items():
        getattr(interval, name).extend(islice(numbers, len(values)))
    interval.num_steps += 1
    interval.seconds += time.perf_counter() - start
    return StepResult(
        grad_norm=grad_norm,
        adjoint_residual=adjoint_residual,
        finite=finite,
        unconverged=unconverged,
        interrupted=num_stops > 0,
    )


def facts_of(solution: Solution, *, unrolled: bool) -> dict[str, Tensor]:
    """What an `Interval` keeps of a solve, or of the evaluations of an unrolled model, (B,) each."""
    facts = {"evaluations": solution.num_evaluations, "residuals": solution.relative_residual}
    return facts if unrolled else {**facts, "converged": solution.converged, "fallbacks": solution.used_fallback}


def give_up_if_hopeless(result: StepResult, progress: Progress, settings: TrainingConfig) -> None:
    """Raise if the step at hand must be the last, before anything is written of it; on all processes or none."""
    policy, limit = settings.unconverged_adjoint.policy, settings.unconverged_adjoint.residual
    too_many = progress.num_skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW
    if too_many and not result.finite:
        raise FloatingPointError(
            f"step {progress.step}: loss or gradient not finite, and no update for {MAX_SKIPPED_IN_A_ROW} steps in a "
            "row; begin a new run with a lower training.optimizer.lr or training.clip_norm."
        )
    if result.unconverged and (too_many or policy == "raise"):
        count = f"; no update for {MAX_SKIPPED_IN_A_ROW} steps in a row" if policy == "skip" else ""
        raise SolveError(
            f"step {progress.step}: an adjoint solve did not converge (relative residual {result.adjoint_residual:.2g}, "
            f"above training.unconverged_adjoint.residual={limit}){count}. The checkpoints are as they were: continue "
            "with --resume and training.unconverged_adjoint.policy=warn, or begin a new run with a larger "
            "model.adjoint.stopping.max_steps or training.jacobian.weight, or a lower training.optimizer.lr."
        )


def describe_unconverged(
    step: int, interval: Interval, metrics: Mapping[str, float | int | None], settings: TrainingConfig
) -> str:
    """The steps of an interval of which an adjoint solve did not converge, in one line."""
    largest = metrics["adjoint_residual_max"]
    return (
        f"step {step}: warning: an adjoint solve did not converge in {interval.num_unconverged} of {interval.num_steps} "
        f"steps (relative residual up to {math.inf if largest is None else largest:.2g}, above "
        f"{settings.unconverged_adjoint.residual}); their updates "
        + ("were made with inexact gradients" if settings.unconverged_adjoint.updates else "were skipped")
    )


def validate(
    accelerator: Accelerator,
    model: DEQLMForCausalLM,
    corpus: EncodedCorpus,
    recipe: Recipe,
    tracker: Tracker,
    step: int,
) -> None:
    """Measure and log the validation split."""
    result = evaluate_perplexity(model, corpus.splits["valid"], recipe.evaluation, accelerator)
    tracker.log(step, "valid", result.metrics())


def final_report(
    accelerator: Accelerator,
    model: DEQLMForCausalLM,
    corpus: EncodedCorpus,
    recipe: Recipe,
    run: RunFolder,
    tracker: Tracker,
) -> None:
    """Measure the test split, print the report, and write the model with its numbers to the run's `final` folder."""
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
