"""solve(): the only loop. Steps a solver until every unit has stopped, and returns the state with its own residual."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from deq_lm._types import FixedPointMap, Scope
from deq_lm.solvers.base import FixedPointSolver, SolverState
from deq_lm.solvers.map_contract import CheckedMap
from deq_lm.solvers.norms import unit_norm
from deq_lm.solvers.picard import Picard
from deq_lm.solvers.scope import hold
from deq_lm.solvers.solution import ResidualTrace, Solution
from deq_lm.solvers.stopping import Outcome, StoppingRule

FALLBACK = Picard(relaxation=0.5)
"""Slow, and without coefficients that could break down."""


def solve(
    f: FixedPointMap,
    z0: Tensor,
    *,
    solver: FixedPointSolver,
    stopping: StoppingRule | None = None,
    fallback: Picard | None = FALLBACK,
    differentiable: bool = False,
    spacing: float | None = None,
) -> Solution:
    """Find z with f(z) = z.

    Each sequence is solved on its own: its result does not depend on the others in the batch, nor, under the prefix
    scope, does a position's result depend on later positions. What is returned of a sequence that did not converge is its
    best iterate under the sequence scope and its last one under the prefix scope (where the best could only be chosen
    position by position, and the pieces would not be one state); units that diverged go back to the best state they had.

    Autocast applies to f, not to the solver. The host waits for the device once every `stopping.check_every` steps, and a
    few times at the start and the end.

    Args:
        f: the map, (B, L, ...) to the same shape; returns a new tensor from every call.
        z0: the start, (B, L, ...). Half precision is widened: state and inner products are float32 or wider.
        solver: how to step.
        stopping: when to stop; None is `StoppingRule()`.
        fallback: what units go on with, from their best state and for the steps that each has left, after coefficients led
            them astray (DIVERGED, NON_FINITE); None leaves them there. Not used after a solver without coefficients.
        differentiable: record the steps for backpropagation (only for solvers that can be), and return the last iterate.
            Otherwise nothing is recorded.
        spacing: of the numbers that f computes with, relative to their size, where the caller knows better than what can be
            seen of f (`map_contract.spacing_of`); that of its image counts where it is coarser.

    Returns:
        A `Solution`. An outcome other than CONVERGED is a value in it, not an exception.

    Raises:
        ValueError: if z0 has no position axis, is empty or not finite, the solver cannot be differentiated through, or f
            breaks its contract (`CheckedMap`).
    """
    stopping = StoppingRule() if stopping is None else stopping
    if z0.dim() < 2 or z0.numel() == 0:
        raise ValueError(f"solve(z0 of shape {tuple(z0.shape)}): expected a non-empty state (batch, length, ...).")
    if differentiable and not solver.differentiable:
        raise ValueError(
            f"solve({type(solver).__name__}, differentiable=True): its history is written in place and cannot be "
            "backpropagated through. Use Picard or Reversible, or an implicit or phantom adjoint around this solver."
        )
    if not torch.isfinite(z0).all():
        raise ValueError("solve(z0): the start has NaN or infinite entries; start from zeros or a finite state.")
    z0 = z0.to(torch.promote_types(z0.dtype, torch.float32))
    device_type = z0.device.type
    f = CheckedMap(f, device_type, spacing=spacing)
    with torch.set_grad_enabled(differentiable), torch.autocast(device_type, enabled=False):
        run = _Run(f, solver, stopping, z0)
        run.iterate(solver, keep_best=not differentiable)
        if not differentiable:
            if fallback is not None and not solver.differentiable and run.failed().any():
                run.fall_back(fallback)
            worse = ~(run.progress.norm <= run.progress.best_norm)  # NaN is
            unsolved = run.progress.outcome != Outcome.CONVERGED if solver.scope == "sequence" else run.failed()
            run.return_to_best(unsolved & worse)
        return run.solution(solver.trail(run.state) if differentiable else None)


class _Run:
    """One solve under way."""

    def __init__(self, f: CheckedMap, solver: FixedPointSolver, stopping: StoppingRule, z0: Tensor) -> None:
        self.f, self.stopping = f, stopping
        self.scope: Scope = solver.scope
        self.state: SolverState = solver.init(f, z0)
        norm, image_norm = self._norms()
        self.progress = stopping.begin(norm, image_norm, self.state.num_evaluations, f.spacing(z0.dtype))
        self.best_point = self.state.point
        self.trace = [_last(norm, image_norm)]
        self.used_fallback = torch.zeros_like(self.progress.active)

    def iterate(self, solver: FixedPointSolver, *, keep_best: bool) -> None:
        """Step until every unit has stopped."""
        for step in range(self.stopping.max_steps):
            active: Tensor | None = self.progress.active
            is_best = self.progress.improved | (self.progress.outcome == Outcome.CONVERGED)  # or needs no better one
            all_best = False
            if step % self.stopping.check_every == 0:  # one synchronization for all questions
                questions = torch.stack([active.any(), active.all(), is_best.all()])
                any_active, all_active, all_best = questions.tolist()
                if not any_active:
                    break
                if all_active and self.stopping.check_every == 1:
                    active = None
            if keep_best:  # a copy only if the best states come from different steps
                self.best_point = self.state.point if all_best else hold(is_best, self.state.point, self.best_point)
            evaluations_before = self.state.num_evaluations
            self.state = solver.step(self.f, self.state, active)
            norm, image_norm = self._norms()
            self.trace.append(_last(norm, image_norm))
            num_evaluations = self.state.num_evaluations - evaluations_before
            self.progress = self.stopping.advance(self.progress, norm, image_norm, num_evaluations)
        if keep_best:
            self.best_point = hold(self.progress.improved, self.state.point, self.best_point)

    def failed(self) -> Tensor:
        """Units that diverged or met something not finite, (B, U) bool."""
        return self.progress.outcome >= Outcome.DIVERGED

    def return_to_best(self, units: Tensor) -> None:
        """Put units back to their best points and evaluate f there, which together they need, once more."""
        if units.any():
            point = hold(units, self.best_point, self.state.point)
            and_later_ones = units.cumsum(dim=1) > 0  # what nothing was put back before keeps its image to the bit
            image = hold(and_later_ones, self.f(point), self.state.image)
            self.state = SolverState(point, image, self.state.num_evaluations + 1)
            extra = units.any(dim=1, keepdim=True).int()
            self.progress = replace(self.progress, num_evaluations=self.progress.num_evaluations + extra)

    def fall_back(self, solver: Picard) -> None:
        """Go on from the best points of failed units with another solver, for the steps that each has left."""
        units = self.failed() & self.progress.best_norm.isfinite()
        self.return_to_best(units)
        self.used_fallback = units
        self.progress = self.stopping.reopen(self.progress, units)
        self.iterate(solver, keep_best=True)

    def solution(self, trail: SolverState | None) -> Solution:
        norm, _ = self._norms()
        progress = self.progress
        return Solution(
            z=self.state.point,
            image=self.state.image,
            outcome=progress.outcome.amax(dim=1),
            residual_norm=norm[:, -1],
            num_steps=progress.num_steps.amax(dim=1),
            num_evaluations=progress.num_evaluations.amax(dim=1),
            position_num_steps=progress.num_steps.expand(self.state.point.shape[:2]),
            position_num_evaluations=progress.num_evaluations.expand(self.state.point.shape[:2]),
            used_fallback=self.used_fallback.any(dim=1),
            trace=ResidualTrace(*map(torch.stack, zip(*self.trace, strict=True))),
            trail=trail,
        )

    def _norms(self) -> tuple[Tensor, Tensor]:
        """||f(z) - z|| and ||f(z)|| of each unit, (B, U); statistics, so never recorded."""
        with torch.no_grad():
            return unit_norm(self.state.residual, self.scope), unit_norm(self.state.image, self.scope)


def _last(norm: Tensor, image_norm: Tensor) -> tuple[Tensor, Tensor]:
    """The norms of whole sequences, (B,); copies, since a view would keep those of all units alive."""
    return norm[:, -1].clone(), image_norm[:, -1].clone()
