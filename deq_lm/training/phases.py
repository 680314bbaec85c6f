"""What changes over the steps of a run: how deep a step goes, by which adjoint, and how much it is regularized.

A recipe's `training.phases` are stretches from the start on, in order; in each a step goes otherwise than the `model`
section says, and after the last one as it says. `training.max_steps_jitter` varies the budget of every solve, and
`training.jacobian` may grow. Evaluation always goes by the `model` section.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from warnings import warn

from deq_lm.adjoints import Adjoint, Implicit
from deq_lm.errors import ConfigError, UnusedSettingWarning
from deq_lm.modeling import DEQLMConfig
from deq_lm.modeling.builders import adjoint_mapping, build_adjoint, build_solver, build_stopping
from deq_lm.solvers import StoppingRule
from deq_lm.structure import to_mapping


@dataclass(frozen=True)
class PhaseConfig:
    """One stretch. It ends at a share of the schedule's steps; the next one begins there.

    Attributes:
        until: where it ends, in (0, 1].
        num_unrolled_steps: a step goes through so many plain evaluations of the cell, all differentiated, instead of a
            solve (shallow pretraining); None solves. Excludes the next two.
        max_steps: instead of `model.stopping.max_steps`; None is that.
        adjoint: instead of `model.adjoint`, a section like it; None is that.
        regularize: whether `training.jacobian` counts; never without a solve.

    Raises:
        ValueError: if a value is out of range, or nothing differs in this phase.
    """

    until: float
    num_unrolled_steps: int | None = None
    max_steps: int | None = None
    adjoint: Mapping[str, Any] | None = None
    regularize: bool = True

    def __post_init__(self) -> None:
        if not 0.0 < self.until <= 1.0:
            raise ValueError(f"until={self.until}: expected a share of the steps in (0, 1], at which the phase ends.")
        for name in ("num_unrolled_steps", "max_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected 1 or more, or null.")
        of_a_solve = [name for name in ("max_steps", "adjoint") if getattr(self, name) is not None]
        if self.num_unrolled_steps is not None and of_a_solve:
            raise ValueError(
                f"num_unrolled_steps={self.num_unrolled_steps} with {' and '.join(of_a_solve)}: a step either goes through "
                "plain evaluations or solves. Give one of the two."
            )
        if self.num_unrolled_steps is None and not of_a_solve and self.regularize:
            raise ValueError("nothing differs from the model section in this phase. Say what does, or leave it out.")


@dataclass(frozen=True)
class JacobianConfig:
    """Jacobian regularization: keeps the cell solvable by adding its Jacobian's size at the equilibrium to the loss.

    Attributes:
        weight: of ||df/dz||_F^2 per entry of the state, or of ||df/dz||_2^2, against the nats per token; > 0, or 0 where it
            grows.
        probability: of adding it to a segment of a step that solves (it costs a second backward pass), in (0, 1].
        growth: of the weight; None leaves it constant.
        power_iterations: None takes the Frobenius norm, the mean gain of all directions, and 1 or more an estimate of the
            spectral norm, the largest gain (`deq_lm.regularizers.jacobian_spectral`), which is larger and wants a smaller
            weight.
    """

    weight: float
    probability: float
    growth: GrowthConfig | None
    power_iterations: int | None = None

    def __post_init__(self) -> None:
        if self.weight < 0 or (self.weight == 0 and self.growth is None):
            raise ValueError(
                f"weight={self.weight}: expected more than 0, or 0 with a growth, or null for the section: no "
                "regularization."
            )
        if not 0 < self.probability <= 1:
            raise ValueError(f"probability={self.probability}: expected a share of the segments in (0, 1].")
        if self.power_iterations is not None and self.power_iterations < 1:
            raise ValueError(
                f"power_iterations={self.power_iterations}: expected 1 or more (spectral norm), or null (Frobenius norm)."
            )
        if self.growth is not None and self.growth.max_weight is not None and self.growth.max_weight <= self.weight:
            raise ValueError(
                f"growth.max_weight={self.growth.max_weight}: expected more than weight={self.weight}, from which it "
                "grows, or null: without end."
            )

    def weight_at(self, step: int) -> float:
        """The weight in a step, counted from 0."""
        if self.growth is None:
            return self.weight
        num_increases = max(0, step - self.growth.first_step) // self.growth.every_steps
        grown = self.weight + self.growth.increase * num_increases
        return grown if self.growth.max_weight is None else min(grown, self.growth.max_weight)


@dataclass(frozen=True)
class GrowthConfig:
    """A staircase, as in Bai et al. 2021; with `every_steps` 1, a straight ramp. Steps are counted from 0.

    Attributes:
        first_step: where it begins; the first increase comes `every_steps` later.
        every_steps: steps between increases, 1 or more.
        increase: of the weight, each time; > 0.
        max_weight: where it ends; None never does.
    """

    first_step: int
    every_steps: int
    increase: float
    max_weight: float | None

    def __post_init__(self) -> None:
        if self.first_step < 0:
            raise ValueError(f"first_step={self.first_step}: expected 0 (from the start) or more.")
        if self.every_steps < 1:
            raise ValueError(f"every_steps={self.every_steps}: expected 1 or more.")
        if not self.increase > 0:
            raise ValueError(
                f"increase={self.increase}: expected more than 0, or null for the section: a constant weight."
            )


@dataclass(frozen=True)
class StepPlan:
    """How the forward passes of one step go; None is what the model says.

    Attributes:
        num_unrolled_steps: plain evaluations instead of a solve.
        stopping: rule of the solve.
        adjoint: of the solve.
        jacobian_weight: of the regularization; 0 is none.
    """

    num_unrolled_steps: int | None = None
    stopping: StoppingRule | None = None
    adjoint: Adjoint | None = None
    jacobian_weight: float = 0.0

    def arguments(self) -> dict[str, Any]:
        """Those of the model's forward."""
        return {
            "num_unrolled_steps": self.num_unrolled_steps,
            "stopping": self.stopping,
            "adjoint": self.adjoint,
        }

    def with_budget(self, factor: int, stopping: StoppingRule, adjoint: Adjoint) -> StepPlan:
        """The same with `factor` times the steps in every solve.

        Args:
            factor: 1 or more.
            stopping: the model's, in training.
            adjoint: the model's.
        """
        if self.num_unrolled_steps is not None:
            return self

        def widened(rule: StoppingRule) -> StoppingRule:
            return replace(rule, max_steps=factor * rule.max_steps)

        adjoint = self.adjoint or adjoint
        if isinstance(adjoint, Implicit):
            adjoint = replace(adjoint, stopping=widened(adjoint.stopping))
        return replace(self, stopping=widened(self.stopping or stopping), adjoint=adjoint)


def plan_step(
    step: int,
    *,
    phases: Sequence[PhaseConfig],
    num_steps: int,
    stopping: StoppingRule,
    jitter: int,
    jacobian: JacobianConfig | None,
) -> StepPlan:
    """The plan of a step. Draws from `random` if there is a jitter, so that a resumed run draws on.

    Args:
        step: counted from 0.
        phases: in order.
        num_steps: of the schedule, of which `until` is a share.
        stopping: the model's, in training.
        jitter: steps by which the budget of a solve is cut at most, uniformly.
        jacobian: regularization, or None.
    """
    phase = next((phase for _, end, phase in stretches(phases, num_steps) if step < end), None)
    if phase is not None and phase.num_unrolled_steps is not None:
        return StepPlan(num_unrolled_steps=phase.num_unrolled_steps)
    max_steps = stopping.max_steps if phase is None or phase.max_steps is None else phase.max_steps
    if jitter:
        max_steps -= random.randint(0, jitter)  # noqa: S311
    regularize = jacobian is not None and (phase is None or phase.regularize)
    return StepPlan(
        stopping=None if max_steps == stopping.max_steps else replace(stopping, max_steps=max_steps),
        adjoint=None
        if phase is None or phase.adjoint is None
        else build_adjoint(phase.adjoint, "training.phases.adjoint"),
        jacobian_weight=jacobian.weight_at(step) if regularize and jacobian is not None else 0.0,
    )


def stretches(phases: Sequence[PhaseConfig], num_steps: int) -> Iterator[tuple[int, int, PhaseConfig | None]]:
    """(first step, step after the last one, phase) from step 0 to `num_steps`; the last has no phase, and may be empty."""
    start = 0
    for phase in phases:
        end = round(phase.until * num_steps)
        yield start, end, phase
        start = end
    yield start, num_steps, None


def check_phases(
    phases: Sequence[PhaseConfig],
    *,
    num_steps: int,
    jitter: int,
    jacobian: JacobianConfig | None,
    config: DEQLMConfig,
) -> list[Adjoint]:
    """The adjoints that a run solves with; none, if it solves nothing. Warns of what has no effect.

    Args:
        phases: in order.
        num_steps: of the schedule.
        jitter: `training.max_steps_jitter`.
        jacobian: regularization, or None.
        config: of the model.

    Raises:
        ConfigError: the training changes what the model does not have, or so that it cannot be.
    """
    if config.depth != "equilibrium":
        _refuse_what_needs_a_solve(phases, jitter=jitter, jacobian=jacobian, depth=config.depth)
    own_adjoint = build_adjoint(config.adjoint, "model.adjoint")
    budget = build_stopping(config.stopping, "model.stopping").max_steps
    adjoints, budgets, regularizes = [], [], False
    for i, (start, end, phase) in enumerate(stretches(phases, num_steps)):
        where = f"training.phases[{i}]"
        adjoint = own_adjoint
        if phase is not None:
            if end == start:
                _warn(
                    f"{where}: until={phase.until} of {num_steps} steps is step {end}, where it begins. Give a larger "
                    "share, or leave the phase out."
                )
            if not phase.regularize and (jacobian is None or phase.num_unrolled_steps is not None):
                missing = "solve" if jacobian is not None else "regularization (training.jacobian)"
                _warn(f"{where}.regularize=false: there is no {missing} in it. Leave it out.")
            if phase.adjoint is not None:
                adjoint = _checked_adjoint(phase.adjoint, config, f"{where}.adjoint")
        if end > start and config.depth == "equilibrium" and (phase is None or phase.num_unrolled_steps is None):
            adjoints.append(adjoint)
            budgets.append(budget if phase is None or phase.max_steps is None else phase.max_steps)
            regularizes |= phase is None or phase.regularize
    if budgets and min(budgets) < jitter:
        raise ConfigError(
            f"training.max_steps_jitter={jitter}: expected at most {min(budgets)}, the smallest budget it is taken from."
        )
    if config.depth == "equilibrium":
        if jitter and not budgets:
            _warn(f"training.max_steps_jitter={jitter}: no step of the run solves. Give 0.")
        if jacobian is not None and not regularizes:
            _warn("training.jacobian: the phases leave no step that it is for. Give null.")
    return adjoints


def comparable_phases(phases: Sequence[PhaseConfig], num_steps: int) -> tuple[dict[str, Any], ...]:
    """The phases with all defaults filled in, and with the steps that they end at in place of shares."""
    return tuple(
        {
            **to_mapping(phase),
            "until": end,
            "adjoint": phase.adjoint and adjoint_mapping(build_adjoint(phase.adjoint, "training.phases.adjoint")),
        }
        for _, end, phase in stretches(phases, num_steps)
        if phase is not None
    )


def _refuse_what_needs_a_solve(
    phases: Sequence[PhaseConfig], *, jitter: int, jacobian: JacobianConfig | None, depth: str
) -> None:
    """Raise if something is for an equilibrium; unrolled models have a regularization and phases of another depth."""
    stack = depth == "stack"
    given = {
        "max_steps_jitter": jitter > 0,
        "jacobian": stack and jacobian is not None,
        "phases": any(stack or phase.num_unrolled_steps is None for phase in phases),
    }
    for name, is_given in given.items():
        if is_given:
            empty = {"max_steps_jitter": "0", "jacobian": "null", "phases": "[]"}[name]
            raise ConfigError(
                f"training.{name}: is for an equilibrium, and model.depth is {depth}. Give {empty}, or take "
                "depth=equilibrium."
            )


def _checked_adjoint(mapping: Mapping[str, Any], config: DEQLMConfig, where: str) -> Adjoint:
    adjoint = build_adjoint(mapping, where)
    try:
        adjoint.check(build_solver(config.solver, "model.solver"))
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
    return adjoint


def _warn(what: str) -> None:
    warn(f"no effect: {what}", UnusedSettingWarning)
