"""When a solve stops, and why it stopped: one rule for all solvers, applied to each unit of the scope on its own.

A unit is a sequence, or under the prefix scope the prefix that ends at position t, and norms are over all of it: it has
converged at the first step at which ||f(z) - z|| <= atol + rtol ||f(z)|| holds for it and every shorter prefix. When and
why position t stops is thus a function of tokens <= t, and every prefix is solved as well as it would be if the text ended
there. A unit that has stopped is frozen. It may converge or stall only together with or after all units before it, whose
later moves would change its image; one that diverges, or has no steps left, is frozen at once.

Where the tolerance is finer than f's numbers (1e-3 in bfloat16) no unit can converge: its residual falls to the size of
f's rounding and then fluctuates. The smallest value so far still improves by a few per cent now and then, so that
`patience` alone would wait for ever. Hence a stricter test at this floor. Once a unit's residual has been below 1.5 times
the spacing of f's numbers (`norms.spacing`), it has to halve within four steps, each time anew, or the unit stalls at the
fifth. (A solve that still converges there, but more slowly than that, is ended as well.) The test applies only where the
tolerance is below half the spacing: in float32, 6e-8.

How soon that is: of trained Transformer-XL cells, on which the constants below were chosen, and of multiscale ones, on
which they were not, Broyden's and Anderson's solves in bfloat16 end within five evaluations of twice their least residual
in half to all of the sequences, and within eleven in all. A map that does not contract has no floor that plain iteration
reaches, and ends by `patience` or its steps. An adjoint equation's floor is lower: it is taken to be a quarter of the
spacing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor

GAIN = 0.99
"""An improvement is one to less than this times the residual at the last one."""

AT_FLOOR = 1.5
"""Spacings of f's numbers, relative to the image, at which a residual may be noise. Solves of a trained Transformer-XL cell
in bfloat16 end at 0.5 to 0.9 of them."""
FLOOR_GAIN = 0.5
FLOOR_PATIENCE = 5
"""What improvement and patience are there: the noise of a residual stays within a factor of two."""


class Outcome(IntEnum):
    """Why a unit stopped, in order of severity: a sequence's outcome is the largest of its units'."""

    CONVERGED = 0
    MAX_STEPS = 1
    STALLED = 2
    DIVERGED = 3
    NON_FINITE = 4


@dataclass(frozen=True)
class Progress:
    """Where each unit of a solve stands. All tensors are (B, U).

    Attributes:
        active: still being iterated.
        outcome: int8 code of `Outcome`; MAX_STEPS while active.
        num_steps: steps taken while active.
        num_evaluations: evaluations of f while active.
        best_norm: smallest finite residual norm so far, inf if none was.
        norm: residual norm of the last state.
        improved: whether the last state is the best so far.
        mark_norm: residual norm at the last marked improvement.
        steps_since_mark: steps since then.
        limit: norm of residual or image above which the unit has diverged; finite, or NaN if the start was.
        spacing: of the numbers that f computes with, relative to their size.
    """

    active: Tensor
    outcome: Tensor
    num_steps: Tensor
    num_evaluations: Tensor
    norm: Tensor
    best_norm: Tensor
    improved: Tensor
    mark_norm: Tensor
    steps_since_mark: Tensor
    limit: Tensor
    spacing: float


@dataclass(frozen=True, kw_only=True)
class StoppingRule:
    """Stop a unit when it is solved, hopeless, or out of budget.

    Attributes:
        max_steps: steps a solver may take; a solve costs one evaluation more than its steps. 0 evaluates f once.
        rtol: relative tolerance, of the norm of f(z).
        atol: absolute tolerance. Needed only where the solution is zero; it is not scale-free.
        patience: stop as STALLED after this many steps without 1 % of improvement; None never does. It is what ends
            maps without a fixed point, such as z + c, whose relative residual falls for ever. Fewer steps are enough at
            the floor of f's precision, see above.
        divergence_factor: stop as DIVERGED when the residual or the image exceeds this many times the first residual and
            image together; None never does. Far out any residual is small relative to the image.
        check_every: ask the device whether all units have stopped every this many steps. The question makes the host
            wait; results and counts do not depend on it.

    Raises:
        ValueError: if a value is out of range.
    """

    max_steps: int = 30
    rtol: float = 1e-3
    atol: float = 0.0
    patience: int | None = 20
    divergence_factor: float | None = 1e4
    check_every: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.max_steps < 2**31:
            raise ValueError(
                f"StoppingRule(max_steps={self.max_steps}): expected 0, which evaluates f once, to 2^31 - 1."
            )
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if not 0.0 <= value < float("inf"):
                raise ValueError(
                    f"StoppingRule({name}={value}): expected a finite value >= 0. With atol = rtol = 0 all steps are taken."
                )
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"StoppingRule(patience={self.patience}): expected 1 or more, or None for no limit.")
        if self.divergence_factor is not None and not self.divergence_factor > 1:
            raise ValueError(
                f"StoppingRule(divergence_factor={self.divergence_factor}): expected a value above 1, or None for no limit."
            )
        if self.check_every < 1:
            raise ValueError(f"StoppingRule(check_every={self.check_every}): expected 1 or more steps.")

    @classmethod
    def fixed(cls, num_steps: int) -> StoppingRule:
        """Take exactly `num_steps` steps, whatever the residual (unless it becomes exactly zero, or non-finite)."""
        return cls(max_steps=num_steps, rtol=0.0, atol=0.0, patience=None, divergence_factor=None)

    def begin(self, norm: Tensor, image_norm: Tensor, num_evaluations: int, spacing: float) -> Progress:
        """Judge the start.

        Args:
            norm: ||f(z) - z|| of each unit, (B, U).
            image_norm: ||f(z)|| likewise.
            num_evaluations: what it has cost.
            spacing: of the numbers that f computes with, relative to their size.
        """
        limit = torch.full_like(norm, torch.finfo(norm.dtype).max)
        if self.divergence_factor is not None:
            limit = (self.divergence_factor * (norm + image_norm)).minimum(limit)
        counts = torch.zeros_like(norm, dtype=torch.int32)
        start = Progress(
            active=torch.ones_like(norm, dtype=torch.bool),
            outcome=torch.full_like(norm, Outcome.MAX_STEPS, dtype=torch.int8),
            num_steps=counts,
            num_evaluations=counts + num_evaluations,
            norm=norm,
            best_norm=torch.full_like(norm, float("inf")),
            improved=torch.ones_like(norm, dtype=torch.bool),
            mark_norm=torch.full_like(norm, float("inf")),
            steps_since_mark=counts,
            limit=limit,
            spacing=spacing,
        )
        return self._judge(start, norm, image_norm)

    def advance(self, progress: Progress, norm: Tensor, image_norm: Tensor, num_evaluations: int) -> Progress:
        """Judge the units after one more step, which cost `num_evaluations`."""
        stepped = replace(
            progress,
            num_steps=progress.num_steps + progress.active,
            num_evaluations=torch.add(progress.num_evaluations, progress.active, alpha=num_evaluations),
        )
        return self._judge(stepped, norm, image_norm)

    def reopen(self, progress: Progress, units: Tensor) -> Progress:
        """Let units that have stopped, (B, U) bool, go on from their best states for the steps that each has left."""
        return replace(
            progress,
            active=units & (progress.num_steps < self.max_steps),
            outcome=torch.where(units, int(Outcome.MAX_STEPS), progress.outcome).to(torch.int8),
            norm=torch.where(units, progress.best_norm, progress.norm),
            mark_norm=torch.where(units, progress.best_norm, progress.mark_norm),
            steps_since_mark=torch.where(units, 0, progress.steps_since_mark),
        )

    def _judge(self, progress: Progress, norm: Tensor, image_norm: Tensor) -> Progress:
        # A few numbers a unit: on a GPU it is the operations that cost, so there is none without use. A unit that is not
        # finite makes every longer prefix so: norms are sums over all of it.
        active = progress.active
        improved = active & (norm < progress.best_norm)  # never, if NaN
        best_norm = torch.where(improved, norm, progress.best_norm)
        progress = replace(progress, norm=norm, improved=improved, best_norm=best_norm)
        tolerance = self.rtol * image_norm
        if self.atol > 0.0:
            tolerance = tolerance + self.atol
        solved = ~_any_up_to(norm > tolerance)
        failed = ~(torch.maximum(norm, image_norm) <= progress.limit)  # always, if NaN
        settled = solved | failed
        outcome = torch.full_like(progress.outcome, Outcome.MAX_STEPS)
        if self.patience is not None:
            progress, stalled = self._mark(progress, self.patience, tolerance, image_norm)
            settled |= stalled
            outcome.masked_fill_(stalled, Outcome.STALLED)
        outcome.masked_fill_(solved, Outcome.CONVERGED)
        outcome.masked_fill_(failed, Outcome.DIVERGED)
        outcome.masked_fill_(~(norm < float("inf")), Outcome.NON_FINITE)

        waits = _any_up_to(active & ~settled)  # for itself or one before it
        goes_on = active & waits & ~failed & (progress.num_steps < self.max_steps)
        outcome = torch.where(active == goes_on, progress.outcome, outcome)
        return replace(progress, active=goes_on, outcome=outcome)

    def _mark(
        self, progress: Progress, patience: int, tolerance: Tensor, image_norm: Tensor
    ) -> tuple[Progress, Tensor]:
        """Mark improvements, and say which units, (B, U) bool, have gone without for too long, stopped ones among them."""
        since_mark = progress.steps_since_mark + 1
        marked = progress.norm < GAIN * progress.mark_norm
        allowed: Tensor | int = patience
        if self.rtol < progress.spacing / 2:
            spacing = progress.spacing * image_norm
            at_floor = (tolerance < spacing / 2) & (progress.best_norm <= AT_FLOOR * spacing)
            halved = (progress.norm < FLOOR_GAIN * progress.mark_norm) & (since_mark < FLOOR_PATIENCE)
            marked = torch.where(at_floor, halved, marked)
            allowed = torch.where(at_floor, min(patience, FLOOR_PATIENCE), patience)
        since_mark.masked_fill_(marked, 0)
        mark_norm = torch.where(marked, progress.norm, progress.mark_norm)
        return replace(progress, mark_norm=mark_norm, steps_since_mark=since_mark), since_mark >= allowed


def _any_up_to(condition: Tensor) -> Tensor:
    """Whether a condition holds at this unit or any before it, (B, U) bool."""
    return condition if condition.shape[1] == 1 else condition.cumsum(dim=1) > 0
