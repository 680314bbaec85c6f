"""The training story in reading order: set up, step, log, evaluate, save, report.

Data and schedule are not handed to Accelerate. Its data loader deals batches out in turn, so that a process would
never see two consecutive segments of one text and memory would mean nothing; here each process owns whole streams. Its
scheduler would step once per process.
"""

from __future__ import annotations

import logging
import signal
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from transformers.utils.logging import disable_progress_bar

from deq_lm.adjoints import Implicit
from deq_lm.adjoints.implicit import ADJOINT_FLOOR
from deq_lm.data.encoding import EncodedCorpus, prepare
from deq_lm.data.streams import ContiguousStreams
from deq_lm.data.tokenizers import vocabulary_hash
from deq_lm.errors import CheckpointError, ConfigError, Interrupted
from deq_lm.evaluation import PerplexityResult, evaluate, evaluate_perplexity, render, score_split, write_record
from deq_lm.evaluation.contraction import largest_spectral_radius
from deq_lm.evaluation.model_card import write_model_card
from deq_lm.evaluation.modes import remembering
from deq_lm.evaluation.sample import sample_text
from deq_lm.modeling import DEQLMForCausalLM, build_config
from deq_lm.modeling.builders import build_adjoint, build_stopping
from deq_lm.structure import to_mapping
from deq_lm.training import checkpoint, sharding
from deq_lm.training.distillation import load_teacher
from deq_lm.training.durable import begin_folder, publish_folder
from deq_lm.training.export import save_model
from deq_lm.training.faults import describe_account, describe_faults, give_up
from deq_lm.training.identity import Identity, comparable_config
from deq_lm.training.optimizer import make_optimizer
from deq_lm.training.phases import comparable_phases, stretches
from deq_lm.training.process import StopSignal, check_processes
from deq_lm.training.recipe import Recipe
from deq_lm.training.run_folder import RunFolder
from deq_lm.training.schedules import make_schedule
from deq_lm.training.state import Progress, TrainingState
from deq_lm.training.step import train_step
from deq_lm.training.tracking import Interval, Tracker, memory_use, summarize

logger = logging.getLogger(__name__)

BFLOAT16_FLOOR = 2.0**-8
"""The relative residual at which bfloat16's rounding, of 8 bits, ends a forward solve: measured, 2e-3 to 4e-3."""


def train(recipe: Recipe, *, resume: bool = False) -> int | None:
    """Train, evaluate and report one run, in as many processes as the launcher has started.

    Args:
        recipe: what to do.
        resume: continue from the newest complete checkpoint in the run folder, or from the start if there is none.

    Returns:
        None at the end of the run; the number of the signal (SIGINT, SIGTERM) that made it stop early, after a
        checkpoint of the step at hand. A validation or the report at the end breaks off, and is made on resuming.

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

    # before anything is drawn: loading draws random numbers, too
    tokenizer: Any = corpus.tokenizer
    teacher = load_teacher(settings.distillation, tokenizer, accelerator.device)

    # model: the same initial weights everywhere, then different dropout masks
    set_seed(recipe.seed)
    config = build_config(recipe.model, len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    config.n_ctx = settings.segment_length + config.mem_len
    config.vocabulary_sha256 = vocabulary_hash(tokenizer).hexdigest()
    model = DEQLMForCausalLM(config)
    set_seed(recipe.seed, device_specific=True)
    optimizer = make_optimizer(model, settings.optimizer)
    schedule = make_schedule(optimizer, settings.schedule, max_steps=settings.max_steps)
    wrapped, optimizer = sharding.prepare(accelerator, model, optimizer)

    state = TrainingState(model, optimizer, schedule, streams, teacher=teacher)
    identity = Identity(
        recipe=to_mapping(recipe),
        model_config=comparable_config(model.config),
        data_fingerprint=corpus.fingerprint,
        num_processes=accelerator.num_processes,
        phases=comparable_phases(settings.phases, settings.num_schedule_steps),
        teacher_sha256=teacher and teacher.sha256,
        num_taught_steps=0 if teacher is None else teacher.config.num_taught_steps(settings.num_schedule_steps),
    )
    del teacher  # which the state lets go of when it has taught
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
        owed = ["valid", "sample"] if progress.owes_validation else []
        owed += ["faults", "test"] if progress.step == settings.max_steps else []  # the report is made, or made anew
        run.open(recipe, step=progress.step, owed=owed)
        checkpoint.warn_of_little_space(run.checkpoints, model, keep=settings.keep_checkpoints)

    tracker = Tracker(
        run,
        step=progress.step,
        max_steps=settings.max_steps,
        tensorboard=settings.track,
        enabled=accelerator.is_main_process,
    )
    with tracker, StopSignal() as stop:
        tracker.say(describe(recipe, corpus, model, accelerator, newest))
        if progress.owes_validation:  # its checkpoint is there
            validate(accelerator, model, corpus, recipe, tracker, progress, stop)
        interrupted = progress.owes_validation
        while progress.step < settings.max_steps and not interrupted:
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
                memory = memory_use(accelerator.device)
                tracker.log(progress.step, "train", {**metrics, "lr": lr, "grad_norm": grad_norm, **memory})
                interval = state.interval
                for line in describe_faults(progress.step, settings.faults, interval.account, interval.num_steps):
                    tracker.say(line)
                state.interval = Interval()
            is_best = is_due(progress.step, settings.evaluate_every) and validate(
                accelerator, model, corpus, recipe, tracker, progress, stop
            )
            interrupted = result.interrupted or progress.owes_validation
            last = progress.step == settings.max_steps
            if last or is_best or interrupted or is_due(progress.step, settings.checkpoint_every):
                checkpoint.save(
                    run.checkpoints, state, identity, corpus.tokenizer, accelerator, keep=settings.keep_checkpoints
                )
        if not interrupted:
            tracker.record(progress.step, "faults", to_mapping(progress.account))
            tracker.say(describe_account(progress.account, progress.step))
            interrupted = final_report(accelerator, model, corpus, recipe, run, tracker, stop)
        if interrupted:
            tracker.say(f"stopped at step {progress.step}, checkpoint saved; continue with --resume")
            return stop.number or signal.SIGTERM
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


def warn_of_precision_floor(recipe: Recipe) -> None:
    """Log a warning for each stopping rule of training that no solve in bfloat16 can meet."""
    config = recipe.model_config
    if config.depth != "equilibrium":
        return
    rules = [("model.stopping", build_stopping(config.stopping, "model.stopping"), BFLOAT16_FLOOR)]
    adjoint = build_adjoint(config.adjoint, "model.adjoint")
    if isinstance(adjoint, Implicit):
        rules.append(("model.adjoint.stopping", adjoint.stopping, ADJOINT_FLOOR * BFLOAT16_FLOOR))
    for name, rule, floor in rules:
        if rule.rtol < floor:
            logger.warning(
                "%s.rtol=%g with mixed precision bf16: what is computed in bfloat16 is exact to about %.2g there, so that "
                "solves will stall or run out of steps. Give a rtol above it, or train in float32.",
                name,
                rule.rtol,
                floor,
            )


def validate(
    accelerator: Accelerator,
    model: DEQLMForCausalLM,
    corpus: EncodedCorpus,
    recipe: Recipe,
    tracker: Tracker,
    progress: Progress,
    stop: StopSignal,
) -> bool:
    """Measure and log the validation split, show what the model writes, and note it; whether it is the best so far."""
    whole, config, step = sharding.whole_model(model), recipe.evaluation, progress.step
    valid = corpus.splits["valid"]
    try:
        with stop.breaks_off(whole, accelerator):
            result = evaluate_perplexity(whole, valid, config, accelerator)
    except Interrupted:
        progress.owes_validation = True
        return False
    progress.owes_validation = False
    if accelerator.is_main_process:
        metrics = result.metrics()
        if whole.config.depth == "equilibrium":
            with remembering(whole, config.mem_len):
                metrics["spectral_radius"] = largest_spectral_radius(whole, valid.tokens, config)
        tracker.log(step, "valid", metrics)
        if config.validation_sample_tokens:
            short = replace(config, sample_tokens=config.validation_sample_tokens)
            tracker.show_text(step, "sample", sample_text(whole, corpus.tokenizer, short, seed=recipe.seed).text)
    return progress.is_best(result.perplexity.nats_per_token)


def final_report(
    accelerator: Accelerator,
    model: DEQLMForCausalLM,
    corpus: EncodedCorpus,
    recipe: Recipe,
    run: RunFolder,
    tracker: Tracker,
    stop: StopSignal,
) -> bool:
    """Measure the test split, print the report, and write the model with its numbers to the run's `final` folder.

    Returns:
        Whether a signal broke it off, before anything was written.
    """
    model, config = sharding.whole_model(model), recipe.evaluation
    result, interrupted = None, False
    try:
        with stop.breaks_off(model, accelerator):
            scored = score_split(model, corpus.splits["test"], config, accelerator)
        if accelerator.is_main_process:
            with stop.breaks_off(model):
                result = evaluate(
                    model,
                    corpus,
                    config,
                    scored=scored,
                    seed=recipe.seed,
                    location=str(run.path),
                    recipe=to_mapping(recipe),
                )
    except Interrupted:
        interrupted = True
    if result is not None:
        metrics = PerplexityResult(result.perplexity, result.solves).metrics()
        tracker.log(recipe.training.max_steps, "test", metrics)
        aside = begin_folder(run.final)
        save_model(aside, model, corpus.tokenizer)
        write_record(aside / "evaluation.json", result)
        write_model_card(aside, result)
        publish_folder(aside, run.final)
        tracker.say(f"\n{render(result)}\n\nrun folder: {run.path}")
    return any(gather_object([interrupted]))  # all wait here for the main process


def is_due(step: int, every: int | None) -> bool:
    """Whether something done every so many steps is to be done after `step`."""
    return every is not None and step % every == 0


def describe(
    recipe: Recipe, corpus: EncodedCorpus, model: DEQLMForCausalLM, accelerator: Accelerator, newest: Path | None
) -> str:
    """What is about to happen, in a few lines."""
    settings = recipe.training
    ends = [
        f"{end:,}" for _, end, phase in stretches(settings.phases, settings.num_schedule_steps) if phase is not None
    ]
    taught = settings.distillation
    tokens_per_step = settings.batch_size * settings.segment_length * settings.gradient_accumulation
    return "\n".join(
        [
            f"{recipe.name}: {model.num_parameters():,} parameters, {len(corpus.tokenizer):,} words of vocabulary, "
            f"{corpus.splits['train'].num_tokens:,} tokens of {recipe.data.corpus} to train on",
            f"{settings.max_steps:,} steps of {tokens_per_step:,} tokens on {accelerator.num_processes} process(es), "
            f"{accelerator.device.type}, mixed precision {accelerator.mixed_precision}; run folder {settings.output_dir}",
            *([f"phases end at steps {', '.join(ends)}"] if ends else []),
            *([f"taught by {taught.teacher} for {taught.until:.0%} of the steps"] if taught is not None else []),
            "starting at step 0" if newest is None else f"resuming from {newest}",
        ]
    )
