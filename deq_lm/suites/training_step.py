"""RepeatedStep: the training step of a recipe, as training takes it, over and over, for a meter."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from deq_lm.data.streams import ContiguousStreams
from deq_lm.errors import UnusedSettingWarning
from deq_lm.modeling import DEQLMForCausalLM
from deq_lm.solvers import StoppingRule
from deq_lm.structure import to_mapping
from deq_lm.training.optimizer import make_optimizer
from deq_lm.training.phases import PhaseConfig
from deq_lm.training.recipe import Recipe
from deq_lm.training.state import TrainingState
from deq_lm.training.step import train_step


class RepeatedStep:
    """Steps of one model on one text, each with the memory of the step before; the learning rate is 0.

    Attributes:
        model: on the device of the run.
        optimizer: with its state, after the first step.
    """

    def __init__(self, recipe: Recipe, model: DEQLMForCausalLM, tokens: np.ndarray) -> None:
        """
        Args:
            recipe: of every step; see `steady`.
            model: its weights stay as they are.
            tokens: 1-D; at least two segments of every stream.
        """
        settings = recipe.training
        AcceleratorState._reset_state()  # a process may measure models of different precision, one after the other
        self._accelerator = Accelerator(mixed_precision=settings.mixed_precision)
        streams = ContiguousStreams(
            tokens,
            num_streams=settings.batch_size,
            segment_length=settings.segment_length,
            rank=0,
            num_ranks=1,
            drop_remainder=True,
        )
        optimizer = make_optimizer(model, replace(settings.optimizer, weight_decay=0.0))
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.0, total_iters=2**31)
        self._recipe = recipe
        model.train()  # a loaded one is not: it would solve to the tolerance of evaluation
        self._wrapped, optimizer = self._accelerator.prepare(model, optimizer)
        self._state = TrainingState(model, optimizer, schedule, streams)
        self.model, self.optimizer = model, optimizer

    def run(self) -> None:
        """One step: forward, backward, clipping, the optimizer's update."""
        self._state.progress.step = 0  # a steady recipe has one phase, which never ends
        train_step(self._accelerator, self._wrapped, self._state, self._recipe, stop_requested=False)

    def mean_evaluations(self, solve: Literal["solver", "adjoint"]) -> float | None:
        """Of the cell in a forward or adjoint solve of the steps so far; None without one."""
        evaluations = getattr(self._state.interval, f"{solve}_evaluations")
        is_solved = self._recipe.model_config.depth == "equilibrium" and evaluations
        return statistics.fmean(evaluations) if is_solved else None

    @property
    def memory_bytes(self) -> int:
        """Of the memory carried from step to step."""
        memory = self._state.memory
        return 0 if memory is None else memory.z.nbytes + memory.x.nbytes


def steady(recipe: Recipe, *, regularize: bool, phase: PhaseConfig | None = None) -> Recipe:
    """The recipe whose every step is like those in one phase, at the end of the run by default; without a teacher.

    Args:
        recipe: of the run.
        regularize: whether all steps are regularized, if the phase is at all, or none; the run's are by chance.
        phase: None is what comes after all phases.
    """
    training, jacobian = recipe.training, recipe.training.jacobian
    if not regularize:
        jacobian = None
    elif jacobian is not None:
        weight = jacobian.weight_at(training.num_schedule_steps - 1)
        jacobian = None if weight == 0 else replace(jacobian, weight=weight, probability=1.0, growth=None)
    changed = replace(
        training,
        phases=() if phase is None else (replace(phase, until=1.0),),
        jacobian=jacobian,
        distillation=None,
        max_steps_jitter=0,
        faults=training.faults.ignored(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnusedSettingWarning)  # a regularization, in a phase without
        return replace(recipe, training=changed)


def with_budget(recipe: Recipe, num_evaluations: int) -> Recipe:
    """The recipe with as many evaluations in every solve, or as many layers of the same weights."""
    if recipe.model_config.depth == "unrolled":
        model: Mapping[str, Any] = {**recipe.model, "num_layers": num_evaluations}
    else:
        model = {**recipe.model, "stopping": to_mapping(StoppingRule.fixed(num_evaluations - 1))}
    return replace(recipe, model=model)
