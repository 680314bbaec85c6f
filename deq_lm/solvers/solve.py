"""solve(): the only loop. Steps a solver until every unit has stopped, and returns the state with its own residual."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from deq_lm._types import FixedPointMap
from deq_lm.solvers.base import FixedPointSolver, SolverState
from deq_lm.solvers.norms import sequence_norm, unit_norm
from deq_lm.solvers.scope import hold
from deq_lm.solvers.solution import ResidualTrace, Solution
from deq_lm.solvers.stopping import Outcome, StoppingRule


def solve(
    f: FixedPointMap,
    z0: Tensor,
    *,
    solver: FixedPointSolver,
    stopping: StoppingRule | None = None,
    differentiable: bool = False,
) -> Solution:
    """Find z with f(z) = z.

    Each sequence is solved on its own: its result does not depend on the others in the batch, nor, under the prefix
    scope, does a position's result depend on later positions. What is returned of a sequence that did not converge is its
    best iterate under the sequence scope and its last one under the prefix scope (where the best could only be chosen
    position by position, and the pieces would not be one state); units that diverged go back to the best state they had.

    Args:
        f: the map, (B, L, ...) to the same shape.
        z0: the start, (B, L, ...). Half precision is widened: state and inner products are float32 or wider.
        solver: how to step.
        stopping: when to stop; None is `StoppingRule()`.
        differentiable: record the steps for backpropagation (only for solvers that can be), and return the last iterate.
            Otherwise nothing is recorded.

    Returns:
        A `Solution`. An outcome other than CONVERGED is a value in it, not an exception.

    Raises:
        ValueError: if z0 has no position axis, is empty or not finite, or the solver cannot be differentiated through.
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
    with torch.set_grad_enabled(differentiable):
        return _iterate(f, z0, solver, stopping, keep_best=not differentiable)


def _iterate(
    f: FixedPointMap, z0: Tensor, solver: FixedPointSolver, stopping: StoppingRule, *, keep_best: bool
) -> Solution:
    state = solver.init(f, z0)
    norm, image_norm = _norms(state, solver)
    progress = stopping.begin(norm, image_norm, state.num_evaluations)
    residual_trace, image_trace = [sequence_norm(norm)], [sequence_norm(image_norm)]
    best_point, best_image = state.point, state.image
    active = None  # unknown until asked, and then None means all

    for step in range(stopping.max_steps):
        asked = step % stopping.check_every == 0
        if asked:  # one synchronization for all three questions
            any_active, all_active = torch.stack([progress.active.any(), progress.active.all()]).tolist()
            if not any_active:
                break
            active = None if all_active else progress.active
        if stopping.check_every > 1:
            active = progress.active
        evaluations_before = state.num_evaluations
        state = solver.step(f, state, active)
        norm, image_norm = _norms(state, solver)
        progress = stopping.advance(progress, norm, image_norm, state.num_evaluations - evaluations_before)
        residual_trace.append(sequence_norm(norm))
        image_trace.append(sequence_norm(image_norm))
        if keep_best:
            best_point = hold(progress.improved, state.point, best_point)
            best_image = hold(progress.improved, state.image, best_image)

    if keep_best and solver.scope == "sequence":
        unsolved = progress.outcome != Outcome.CONVERGED
        state = _at(hold(unsolved, best_point, state.point), hold(unsolved, best_image, state.image), state)
    elif keep_best and (failed := progress.outcome >= Outcome.DIVERGED).any():
        # The best states of different prefixes come from different steps: together they need their own image.
        point = hold(failed, best_point, state.point)
        state = _at(point, f(point), state)
        progress = replace(progress, num_evaluations=progress.num_evaluations + failed.any(dim=1, keepdim=True).int())
    norm, _ = _norms(state, solver)
    return Solution(
        z=state.point,
        image=state.image,
        outcome=progress.outcome.amax(dim=1),
        residual_norm=sequence_norm(norm),
        num_steps=progress.num_steps.amax(dim=1),
        num_evaluations=progress.num_evaluations.amax(dim=1),
        position_num_steps=progress.num_steps.expand(state.point.shape[:2]),
        trace=ResidualTrace(torch.stack(residual_trace), torch.stack(image_trace)),
        trail=None if keep_best else solver.trail(state),
    )


def _norms(state: SolverState, solver: FixedPointSolver) -> tuple[Tensor, Tensor]:
    """||f(z) - z|| and ||f(z)|| of each unit, (B, U); statistics, so never recorded."""
    return unit_norm(state.residual.detach(), solver.scope), unit_norm(state.image.detach(), solver.scope)


def _at(point: Tensor, image: Tensor, state: SolverState) -> SolverState:
    return SolverState(point, image, image - point, state.num_evaluations)
