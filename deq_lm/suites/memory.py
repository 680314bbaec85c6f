"""Peak memory of a training step, by what it is for, against depth: measured on any device, out of memory included."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from deq_lm.errors import ConfigError
from deq_lm.evaluation.live_bytes import LiveBytes
from deq_lm.evaluation.records import Record, provenance
from deq_lm.structure import to_mapping
from deq_lm.suites.config import MemorySettings
from deq_lm.suites.subjects import Subject
from deq_lm.suites.training_step import RepeatedStep, steady, with_budget
from deq_lm.training.process import is_out_of_memory
from deq_lm.training.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class MemoryParts:
    """Bytes alive when all but the embedding's are most; `LiveBytes` says what is counted to which.

    Attributes:
        embedding: parameters, gradients and optimizer state of the embedding and output layer, and tensors of their
            shapes; as in the papers they decide nothing here.
        weights: those of all others.
        activations: of evaluations of the cell recorded for a backward pass.
        solver: states and histories of the solvers, forward and adjoint.
        output_layer: logits and what is computed from them.
        rest: temporaries, tokens, and the memory of earlier segments.
    """

    embedding: int
    weights: int
    activations: int
    solver: int
    output_layer: int
    rest: int

    @property
    def without_embedding(self) -> int:
        return self.weights + self.activations + self.solver + self.output_layer + self.rest


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """One step of one model.

    Attributes:
        model: its name in the suite.
        depth: "equilibrium", "unrolled" or "stack".
        num_evaluations: its budget or its layers.
        regularized: with the Jacobian's regularization, a second backward pass.
        at_peak: None if the step ran out of memory.
        largest: the largest sum of all, the embedding's included; None likewise.
        most_activations: most bytes of activations at any time; None likewise.
        most_solver: of the solvers, likewise.
        allocated: peak of what the device's allocator had given to tensors; None on a CPU, which does not say.
    """

    model: str
    depth: str
    num_evaluations: int
    regularized: bool
    at_peak: MemoryParts | None
    largest: int | None
    most_activations: int | None
    most_solver: int | None
    allocated: int | None


@dataclass(frozen=True, kw_only=True)
class MemoryResult(Record):
    """Peak memory of training steps of several models.

    Attributes:
        suite: its name.
        settings: how it was measured.
        device: "cpu", "cuda".
        batch_size, segment_length, mem_len: of the steps.
        recipes: of each model, by its name.
        rows: the steps.
    """

    kind: ClassVar[str] = "memory"

    suite: str
    settings: MemorySettings
    device: str
    batch_size: int
    segment_length: int
    mem_len: int
    recipes: Mapping[str, Mapping[str, Any]]
    rows: tuple[StepMemory, ...]


def measure_memory(
    suite: str, subjects: Sequence[Subject], settings: MemorySettings, device: torch.device
) -> MemoryResult:
    """One row for each model, budget, and with and without regularization where it is trained with any.

    Weights are random and text too: every solve runs its whole budget.

    Args:
        suite: its name, for the record.
        subjects: of each model name the first is measured.
        settings: shape and budgets.
        device: where.

    Raises:
        ConfigError: a vocabulary is not known, or the recipes' steps differ in shape.
    """
    firsts = list({subject.name: subject for subject in reversed(subjects)}.values())[::-1]
    recipes = [_shaped(subject.recipe, settings) for subject in firsts]
    first, *others = shapes = [_shape(recipe) for recipe in recipes]
    if any(shape != first for shape in others):
        raise ConfigError(
            f"memory: the recipes' steps differ in (batch_size, segment_length, mem_len): {shapes}. Give memory the three."
        )
    rows = []
    for subject, recipe in zip(firsts, recipes, strict=True):
        vocab_size = subject.trained(device).config.vocab_size if subject.is_trained else settings.vocab_size
        for varied, num_evaluations, regularize in _variants(recipe, settings.num_evaluations):
            measured = replace(subject, recipe=varied)
            rows.append(_measure(measured, num_evaluations, regularize, settings, vocab_size, device))
    return MemoryResult(
        **provenance(),
        suite=suite,
        settings=settings,
        device=device.type,
        batch_size=first[0],
        segment_length=first[1],
        mem_len=first[2],
        recipes={subject.name: to_mapping(subject.recipe) for subject in firsts},
        rows=tuple(rows),
    )


def _shaped(recipe: Recipe, settings: MemorySettings) -> Recipe:
    """The recipe with the suite's shape, and one segment a step."""
    training, model = recipe.training, recipe.model
    training = replace(
        training,
        batch_size=settings.batch_size or training.batch_size,
        segment_length=settings.segment_length or training.segment_length,
        gradient_accumulation=1,
    )
    if settings.mem_len is not None:
        model = {**model, "cell": {**model["cell"], "mem_len": settings.mem_len}}
    return replace(recipe, training=training, model=model)


def _shape(recipe: Recipe) -> tuple[int, int, int]:
    """Sequences of a step, their length, and positions of memory."""
    cell = recipe.model_config.cell or {}
    return recipe.training.batch_size, recipe.training.segment_length, cell["mem_len"]


def _variants(recipe: Recipe, budgets: Sequence[int]) -> Iterator[tuple[Recipe, int, bool]]:
    """(recipe, its budget, whether its steps are regularized)."""
    regularized = steady(recipe, regularize=True)
    for regularize in (False, True) if regularized.training.jacobian is not None else (False,):
        base = steady(recipe, regularize=regularize)
        config = recipe.model_config
        if config.depth == "stack" and config.num_layers is not None:
            yield base, config.num_layers, regularize
        else:
            for budget in budgets:
                yield with_budget(base, budget), budget, regularize


def _measure(
    subject: Subject,
    num_evaluations: int,
    regularize: bool,
    settings: MemorySettings,
    vocab_size: int | None,
    device: torch.device,
) -> StepMemory:
    training = subject.recipe.training
    num_tokens = 4 * training.batch_size * training.segment_length
    parts = most = largest = allocated = None
    try:
        model = subject.untrained(device, vocab_size=vocab_size)
        tokens = np.random.default_rng(0).integers(model.config.vocab_size, size=num_tokens + 1)
        step = RepeatedStep(subject.recipe, model, tokens)
        meter = _meter(step, settings.limit_bytes)  # of the first step, which makes memory and optimizer state
        meter = _meter(step, settings.limit_bytes)
        parts, most = _parts(step, meter), meter.most
        largest = meter.largest + _static_bytes(step)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            step.run()
            allocated = torch.cuda.max_memory_allocated()
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    gc.collect()  # of the step before the next one
    return StepMemory(
        model=subject.name,
        depth=subject.recipe.model_config.depth,
        num_evaluations=num_evaluations,
        regularized=regularize,
        at_peak=parts,
        largest=largest,
        most_activations=None if most is None else most["activations"],
        most_solver=None if most is None else most["solver"],
        allocated=allocated,
    )


def parts_of_a_step(step: RepeatedStep) -> MemoryParts:
    """What is alive at the peak of a step that is not the first."""
    step.run()  # which makes memory and optimizer state
    return _parts(step, _meter(step, None))


def _meter(step: RepeatedStep, limit_bytes: int | None) -> LiveBytes:
    """One step under a meter that knows gradients when they appear."""
    static = _static_bytes(step)
    meter = LiveBytes(
        embedding_shapes=_embedding_shapes(step),
        limit_bytes=None if limit_bytes is None else max(0, limit_bytes - static),
    )

    def mark(parameter: Tensor) -> None:
        assert parameter.grad is not None
        meter.mark(parameter.grad, "gradients")

    hooks = [parameter.register_post_accumulate_grad_hook(mark) for parameter in _weights(step)]
    try:
        with meter:
            step.run()
    finally:
        for hook in hooks:
            hook.remove()
    return meter


def _parts(step: RepeatedStep, meter: LiveBytes) -> MemoryParts:
    live = meter.parts_at_peak
    return MemoryParts(
        embedding=_bytes_of(step, _embedding(step)) + live["embedding"],
        weights=_bytes_of(step, _weights(step)) + live["gradients"],
        activations=live["activations"],
        solver=live["solver"],
        output_layer=live["output_layer"],
        rest=live["rest"] + step.memory_bytes,
    )


def _static_bytes(step: RepeatedStep) -> int:
    """Of what is there before a step."""
    return _bytes_of(step, [*_embedding(step), *_weights(step)]) + step.memory_bytes


def _weights(step: RepeatedStep) -> list[nn.Parameter]:
    return list(step.model.model.layers.parameters())


def _embedding(step: RepeatedStep) -> list[nn.Parameter]:
    weights = set(_weights(step))
    return [parameter for parameter in step.model.parameters() if parameter not in weights]


def _embedding_shapes(step: RepeatedStep) -> set[tuple[int, ...]]:
    """Of the tables, and of the pieces that an adaptive softmax cuts them into."""
    config = step.model.config
    edges = [0, *(config.embedding or {}).get("cutoffs", ()), config.vocab_size]
    shapes = {tuple(parameter.shape) for parameter in _embedding(step)}
    pieces = {
        (last - first, *shape[1:]) for first, last in pairwise(edges) for shape in shapes if shape[0] == edges[-1]
    }
    return shapes | pieces


def _bytes_of(step: RepeatedStep, parameters: Iterable[nn.Parameter]) -> int:
    """Of parameters and what the optimizer keeps of each."""
    return sum(
        tensor.nbytes
        for parameter in parameters
        for tensor in (parameter, *(kept for kept in step.optimizer.state[parameter].values() if torch.is_tensor(kept)))
    )
