"""What a run would take: its parameters, and the memory and time of a step, measured on a few streams."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from deq_lm.errors import ConfigError
from deq_lm.modeling import DEQLMForCausalLM
from deq_lm.suites.memory import parts_of_a_step
from deq_lm.suites.subjects import Subject
from deq_lm.suites.training_step import RepeatedStep, steady, with_budget
from deq_lm.training.recipe import Recipe
from deq_lm.training.run_folder import RunFolder

MAX_STREAMS = 4
TIMED_STEPS = 2
_OF_THE_STREAMS = ("activations", "solver", "output_layer", "rest")


def dry_run(recipe: Recipe) -> str:
    """A text of what the run would take. Nothing is read but the recipe, and nothing is written.

    A few streams of random tokens go through the recipe's own step, with random weights, every forward solve running its
    whole budget; what grows with the streams is multiplied.

    Raises:
        ConfigError: the vocabulary is known only when the text has been read, or there are several processes.
    """
    if recipe.data.vocab_size is None:
        raise ConfigError(
            f"{recipe.name}: its vocabulary is known when its text has been read, which a dry run does not. Give "
            "data.vocab_size=NUMBER."
        )
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError("a dry run is of one process: start it without a launcher.")
    settings, device = recipe.training, Accelerator().device
    num_streams = min(settings.batch_size, MAX_STREAMS)
    factor = settings.batch_size / num_streams
    budget = _budget(recipe)
    worst = _worst_step(recipe, num_streams, budget)
    model = Subject(recipe.name, worst, RunFolder(Path(settings.output_dir))).untrained(device)
    num_tokens = 2 * num_streams * settings.segment_length
    text = np.random.default_rng(0).integers(model.config.vocab_size, size=num_tokens + 1)
    step = RepeatedStep(worst, model, text)
    parts = parts_of_a_step(step)
    parts = replace(parts, **{name: round(factor * getattr(parts, name)) for name in _OF_THE_STREAMS})
    seconds = factor * settings.gradient_accumulation * _seconds(step, device)
    tokens = settings.batch_size * settings.segment_length * settings.gradient_accumulation
    assumptions = [
        f"measured on {device.type}: {num_streams} of {settings.batch_size} streams, multiplied; random weights and tokens",
        *(
            [f"every forward solve takes {budget} evaluations, its whole budget; trained ones take fewer"]
            * bool(budget)
        ),
        "rest, which has temporaries of the gradient, grows with the streams (an upper estimate)",
        "one process, steps as after all phases" + (", all of them regularized" if worst.training.jacobian else ""),
        "without preparing the text, validation, checkpoints and the final evaluation",
        "tensors only: not what kernels and the allocator take besides",
    ]
    lines = [
        f"{recipe.name}: nothing is trained or written",
        "",
        *_parameter_table(model),
        "",
        "memory of a step, MB",
        *(f"  {field.name.replace('_', ' '):<14}{getattr(parts, field.name) / 1e6:>14,.1f}" for field in fields(parts)),
        f"  {'together':<14}{(parts.embedding + parts.without_embedding) / 1e6:>14,.1f}",
        "",
        f"time: {seconds:,.2f} s a step of {tokens:,} tokens, {_duration(seconds * settings.max_steps)} for "
        f"{settings.max_steps:,} steps",
        "",
        "assumed:",
        *(f"  {assumption}" for assumption in assumptions),
    ]
    return "\n".join(lines)


def _budget(recipe: Recipe) -> int | None:
    """Evaluations of a forward solve at most; None if nothing is solved."""
    config = recipe.model_config
    return config.stopping["max_steps"] + 1 if config.depth == "equilibrium" and config.stopping else None


def _worst_step(recipe: Recipe, num_streams: int, budget: int | None) -> Recipe:
    """The recipe of steps of so many streams and one segment, regularized, whose solves use their whole budget."""
    training = replace(recipe.training, batch_size=num_streams, gradient_accumulation=1)
    worst = steady(replace(recipe, training=training), regularize=True)
    return worst if budget is None else with_budget(worst, budget)


def _seconds(step: RepeatedStep, device: torch.device) -> float:
    """Of the fastest of a few steps."""
    taken = []
    for _ in range(TIMED_STEPS):
        start = time.perf_counter()
        step.run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return min(taken)


def _parameter_table(model: DEQLMForCausalLM) -> list[str]:
    """One line for each kind and shape of tensor, over all layers; a tied one once."""
    counts, sizes = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for name, parameter in model.named_parameters():
        kind = re.sub(r"\.\d+\.", ".*.", name), " x ".join(map(str, parameter.shape))
        counts[kind] += 1
        sizes[kind] += parameter.numel()
    width = max(len(name) for name, _ in counts)
    rows = [f"  {name:<{width}}{n:>5} x {shape:<14}{sizes[name, shape]:>16,}" for (name, shape), n in counts.items()]
    return ["parameters", *rows, f"  {'together':<{width}}{'':>5}   {'':<14}{sum(sizes.values()):>16,}"]


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours:,} h {rest // 60:02} min"
