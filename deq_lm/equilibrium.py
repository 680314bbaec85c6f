"""Equilibrium: a cell, a solver, a stopping rule and an adjoint make a layer of unbounded depth."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from deq_lm.adjoints import Adjoint, Implicit, Unrolled
from deq_lm.cells.base import Cell
from deq_lm.cells.memory import Memory, Past, ProjectedMemory
from deq_lm.cells.module_cell import ModuleCell
from deq_lm.learned_start import LearnedStart
from deq_lm.regularizers import jacobian_penalty
from deq_lm.solvers import Broyden, FixedPointSolver, Picard, Solution, StoppingRule, solve


@dataclass(frozen=True)
class SegmentOutput:
    """What one segment gives.

    Attributes:
        output: f(z*), of the shape of x, with the gradient.
        memory: what the next segment may attend to; None if the cell keeps none, and after a sliding one.
        solution: the forward solve's facts, without gradient; None where nothing is solved.
        jacobian: `jacobian_penalty` at z*, if asked for.
        start_error: `LearnedStart.error`, where there is one and gradients are recorded.
        past: what the next tokens may attend to, after a sliding segment.
    """

    output: Tensor
    memory: Memory | None
    solution: Solution | None
    jacobian: Tensor | None = None
    start_error: Tensor | None = None
    past: ProjectedMemory | None = None


class Equilibrium(nn.Module):
    """Binds a cell once, solves z = f(z), and differentiates the solution.

    The module holds the whole solve: under FSDP it is the unit to shard (called once per forward), and no collective runs
    inside.

    Attributes:
        adjoint_solution: the `Solution` of the adjoint solve in the latest output's backward pass; None before it, or
            without one.
    """

    def __init__(
        self,
        cell: nn.Module,
        *,
        solver: FixedPointSolver | None = None,
        stopping: StoppingRule | None = None,
        evaluation_stopping: StoppingRule | None = None,
        adjoint: Adjoint | None = None,
        learned_start: LearnedStart | None = None,
    ) -> None:
        """None takes the default of the class.

        Args:
            cell: the map: a `Cell`, or any module f(z, x), of which a `ModuleCell` is made.
            solver: forward solver, default `Broyden()`.
            stopping: default `StoppingRule()`.
            evaluation_stopping: the rule in evaluation mode, default `stopping`.
            adjoint: default `Implicit()`.
            learned_start: where solves begin; None is zero.
        """
        super().__init__()
        self.cell = cell if isinstance(cell, Cell) else ModuleCell(cell)
        self.solver = Broyden() if solver is None else solver
        self.stopping = StoppingRule() if stopping is None else stopping
        self.evaluation_stopping = self.stopping if evaluation_stopping is None else evaluation_stopping
        self.adjoint = Implicit() if adjoint is None else adjoint
        self.learned_start = learned_start
        self.adjoint_solution: Solution | None = None
        self.adjoint.check(self.solver)

    @classmethod
    def unrolled(cls, cell: Cell, num_layers: int) -> Equilibrium:
        """The weight-tied network of `num_layers` layers from the same cell: as many plain evaluations, backpropagated."""
        return cls(cell, solver=Picard(), stopping=_layers(num_layers), adjoint=Unrolled())

    def forward(
        self,
        x: Tensor,
        memory: Past | None = None,
        *,
        key_mask: Tensor | None = None,
        sliding: bool = False,
        start: Tensor | None = None,
        stopping: StoppingRule | None = None,
        adjoint: Adjoint | None = None,
        num_unrolled_steps: int | None = None,
        estimate_jacobian: bool = False,
        power_iterations: int | None = None,
    ) -> SegmentOutput:
        """Solve one segment.

        Args:
            x: injected input, (B, L, D); of a `ModuleCell`, (B, ...).
            memory: of the segment before.
            key_mask: (B, L) bool, False at padding.
            sliding: see `Cell.bind`.
            start: where the solve begins, of a shape that expands to that of the state; None is the learned start, or
                zero without one. The solution does not depend on it, but for the tolerance.
            stopping: overrides the rule of the current mode.
            adjoint: overrides `self.adjoint`; has to go with the solver.
            num_unrolled_steps: run this many plain evaluations and backpropagate through them instead (shallow
                pretraining); they begin at `start` or zero.
            estimate_jacobian: also estimate the Jacobian's norm at z*, to be added to the loss.
            power_iterations: of that estimate, see `jacobian_penalty`.

        Raises:
            ValueError: if solves by the solver cannot be differentiated by `adjoint`, or power iterations are given without
                an estimate.
        """
        if power_iterations is not None and not estimate_jacobian:
            raise ValueError(
                f"power_iterations={power_iterations} without estimate_jacobian: expected both, for an estimate of the "
                "spectral norm, or power_iterations=None."
            )
        solver = self.solver
        if adjoint is None:
            adjoint = self.adjoint
        else:
            adjoint.check(solver)
        if num_unrolled_steps is not None:
            solver, adjoint, stopping = Picard(), Unrolled(), _layers(num_unrolled_steps)
        elif stopping is None:
            stopping = self.current_stopping
        run = partial(solve, solver=solver, stopping=stopping)
        f = self.cell.bind(x, memory, key_mask, sliding=sliding)
        z0 = torch.zeros_like(self.cell.as_state(x), dtype=torch.promote_types(x.dtype, torch.float32))
        proposed = self.proposed_start(x, key_mask)
        if start is None and num_unrolled_steps is None:
            start = proposed
        if start is not None:
            z0 = z0 + start.detach()
        if torch.is_grad_enabled():
            self.adjoint_solution = None  # until this output's backward pass
            state, solution = adjoint.apply(f, z0, run, report=self._keep_adjoint_solution)
        else:
            solution = run(f, z0)
            state = solution.image
        state = state.to(x.dtype)
        output = self.cell.read_out(state)
        jacobian = jacobian_penalty(f, solution.z, power_iterations=power_iterations) if estimate_jacobian else None
        start_error = None
        if proposed is not None and torch.is_grad_enabled():
            # after shallow steps, too: parameters without a gradient would stop DDP
            start_error = LearnedStart.error(proposed, solution.z)
        segment = SegmentOutput(output, None, solution, jacobian, start_error)
        if sliding:
            return replace(segment, past=self.cell.keep(f, state, x, memory))
        assert memory is None or isinstance(memory, Memory)
        return replace(segment, memory=self.cell.remember(f, state, x, memory))

    def proposed_start(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor | None:
        """The learned start for an input, of the state's shape; at padding it is 0, as the solution. None without one."""
        if self.learned_start is None:
            return None
        proposed = self.cell.as_state(self.learned_start(x))
        return proposed if key_mask is None else proposed.masked_fill(~key_mask[..., None], 0.0)

    @property
    def current_stopping(self) -> StoppingRule:
        """The stopping rule of the mode that the module is in."""
        return self.stopping if self.training else self.evaluation_stopping

    def _keep_adjoint_solution(self, solution: Solution) -> None:
        self.adjoint_solution = solution


def _layers(num_layers: int) -> StoppingRule:
    if num_layers < 1:
        raise ValueError(f"{num_layers} unrolled layers: expected 1 or more; each is one evaluation of the cell.")
    return StoppingRule.fixed(num_layers - 1)
