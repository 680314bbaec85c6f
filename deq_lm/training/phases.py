"""What changes over the steps of a run: how deep a step goes, by which adjoint, and how much it is regularized.

A recipe's `training.phases` are stretches from the start on, in order; in each a step goes otherwise than the `model`
section says, and after the last one as it says. `training.max_steps_jitter` varies the budget of every solve, and
`training.jacobian` may grow. Evaluation always goes by the `model` section.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deq_lm.adjoints import Adjoint
from deq_lm.modeling.builders import build_adjoint
from deq_lm.solvers import StoppingRule


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
        weight: of ||df/dz||_F^2 per entry of the state, against the nats per token; > 0.
        probability: of adding it to a segment of a step that solves (it costs a second backward pass), in (0, 1].
        growth: what is added to the weight, again and again; None leaves it constant.
    """

    weight: float
    probability: float
    growth: GrowthConfig | None

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"weight={self.weight}: expected more than 0, or null for the section: no regularization.")
        if not 0 < self.probability <= 1:
            raise ValueError(f"probability={self.probability}: expected a share of the segments in (0, 1].")

    def weight_at(self, step: int) -> float:
        """The weight in a step, counted from 0."""
        return self.weight + (0.0 if self.growth is None else self.growth.increase * (step // self.growth.every_steps))


@dataclass(frozen=True)
class GrowthConfig:
    """A staircase, as in Bai et al. 2021; with `every_steps` 1, a straight ramp.

    Attributes:
        every_steps: steps between increases, 1 or more.
        increase: of the weight, each time; > 0.
    """

    every_steps: int
    increase: float

    def __post_init__(self) -> None:
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
    phase = next((phase for phase in phases if step < round(phase.until * num_steps)), None)
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
