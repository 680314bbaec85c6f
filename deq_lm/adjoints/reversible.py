"""Backpropagate through a reversible solve by running it backwards: unrolled gradients without stored activations."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deq_lm._types import FixedPointMap
from deq_lm.adjoints.base import Adjoint, DifferentiableMap, Solve
from deq_lm.errors import ReversalWarning
from deq_lm.solvers import FixedPointSolver, Reversible, Solution
from deq_lm.solvers.lattice import Lattice, pop
from deq_lm.solvers.norms import relative, unit_norm
from deq_lm.solvers.reversible import ReversibleState
from deq_lm.solvers.scope import hold

MISMATCH_LIMIT = 1e-3
"""Distance from the start, relative to the norm of the solution, at which a run backwards warns."""


@dataclass(frozen=True, kw_only=True)
class Reversed(Adjoint):
    """The exact gradient of what a `Reversible` solve computed, equal to `Unrolled` around that solver.

    Backwards, a step costs one recorded evaluation and its vector-Jacobian product; every unit is taken back as many steps
    as it took. Kept from the forward solve are the start, the last pair and the lost digits: for float32, 28 bytes per
    number of the state, and 8 more for every 39 steps at a relaxation of 0.5 (22 at 0.8).

    The states are recovered to the last bit (see `deq_lm.solvers.lattice`), so the way back ends exactly at the start.
    That is checked, and a miss warns. It happens where f is not the same function in both passes (a kernel that is not
    deterministic), or where states outgrew the lattice. The forward solve evaluates f as the backward pass will, recorded
    though nothing is kept, because other kernels may be chosen without a graph: attention then differs by 1e-6 in float32.

    Without the lattice an error grows by 1 / (1 - relaxation) a step. Relative gradient error on a small random
    Transformer-XL cell (eval/benchmarks/reversible.py), by relaxation and steps, for the pair in float32, in float64 with f
    in float32, all in float64, and on the lattice with f in float32 and in float64:

        0.5, 16 steps   6e-3   0      3e-12   1e-7   0
        0.5, 64 steps   0.6    0.08   0.3     1e-7   0
        0.8,  8 steps   9e-3   1e-3   4e-12   2e-7   0
        0.8, 16 steps   0.3    0.02   2e-6    2e-7   0
        0.8, 64 steps   0.6    0.3    1.0     5e-7   0

    Raises:
        ValueError: from `check` and `apply`, if the solver is not `Reversible`.

    References:
        McCallum, Arora, Foster 2025, "Reversible deep equilibrium models", algorithm 2.
    """

    def check(self, solver: FixedPointSolver) -> None:
        if not isinstance(solver, Reversible):
            raise ValueError(_refusal(type(solver).__name__))

    def apply(
        self,
        f: DifferentiableMap,
        z0: Tensor,
        solve: Solve,
        *,
        report: Callable[[Solution], None] | None = None,
    ) -> tuple[Tensor, Solution]:
        solution = solve(_recorded_and_dropped(f), z0.detach(), differentiable=True)
        trail = solution.trail
        if not isinstance(trail, ReversibleState):
            raise ValueError(_refusal("a solver whose steps cannot be undone"))
        solution = replace(solution, trail=None)  # which would hold the pair as long as someone looks at the facts
        return _ReversedGradient.apply(f, solution, trail, z0.detach(), *f.inputs), solution


def _refusal(given: str) -> str:
    return (
        f"The adjoint 'reversible' around {given}: expected the solver Reversible ('reversible' in a configuration), whose "
        "steps it runs backwards. Choose that, or the adjoint 'implicit', which goes with any solver."
    )


def _recorded_and_dropped(f: DifferentiableMap) -> FixedPointMap:
    """f evaluated by the same kernels as with a graph, without keeping what the graph would."""
    leaves = [tensor.detach().requires_grad_() for tensor in f.inputs]
    f = f.with_inputs(leaves)

    def drop(_: Any) -> Any:
        return None

    def evaluate(z: Tensor) -> Tensor:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(drop, drop):
            return f(z.detach().requires_grad_()).detach()

    return evaluate


class _ReversedGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        f: DifferentiableMap,
        solution: Solution,
        trail: ReversibleState,
        z0: Tensor,
        *inputs: Tensor,
    ) -> Tensor:
        ctx.f, ctx.num_steps, ctx.num_words = f, trail.num_steps, len(trail.words)
        ctx.relaxation = trail.lattice.relaxation
        ctx.save_for_backward(
            z0.to(trail.point.dtype),
            solution.position_num_steps,
            trail.lattice.quantum,
            trail.latest,
            trail.previous,
            *trail.words,
            *inputs,
        )
        return solution.image.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (cotangent,) = grad_outputs
        z0, unit_steps, quantum, latest, previous, *rest = ctx.saved_tensors
        words, inputs = rest[: ctx.num_words], rest[ctx.num_words :]
        lattice = Lattice(quantum, ctx.relaxation)
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        f = ctx.f.with_inputs(leaves)
        totals = [torch.zeros_like(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32)) for leaf in leaves]
        scale = unit_norm(latest * quantum, "sequence")
        # Of the loss with respect to the pair after step k; the output is the image of each unit's own last state.
        grad_latest, grad_previous = torch.zeros_like(cotangent), torch.zeros_like(cotangent)

        for step in reversed(range(ctx.num_steps + 1)):  # from the pair after step + 1 to the pair after step
            moved = unit_steps > step
            shrunk, latest = latest, hold(moved, previous, latest)
            with torch.enable_grad():
                z = hold(unit_steps.clamp(max=step) > 0, lattice.read(latest, z0.dtype), z0).requires_grad_()
                image = f(z)
            weight = hold(moved, ctx.relaxation * grad_latest, torch.zeros_like(cotangent))
            weight = hold(unit_steps == step, cotangent, weight)
            grad_z, *grad_leaves = torch.autograd.grad(image, [z, *leaves], weight, materialize_grads=True)
            for total, gradient in zip(totals, grad_leaves, strict=True):
                total += gradient
            grad_latest, grad_previous = (
                hold(moved, grad_previous, grad_latest) + grad_z,
                hold(moved, (1.0 - ctx.relaxation) * grad_latest, grad_previous),
            )
            if step < ctx.num_steps:
                shrunk = shrunk - lattice.increment(image.detach())
                previous = hold(moved, lattice.undo_shrink(shrunk, pop(words, lattice, step, moved)), previous)

        start = lattice.place(z0)
        miss = torch.maximum(*(unit_norm((w - start) * quantum, "sequence") for w in (latest, previous)))
        _warn_of_a_miss(relative(miss, scale))
        return (None, None, None, None, *totals)


def _warn_of_a_miss(mismatch: Tensor) -> None:
    worst = mismatch.max().item()
    if worst > MISMATCH_LIMIT:
        warnings.warn(
            f"Running a reversible solve backwards ended {worst:.1e} (relative) away from its start, more than "
            f"{MISMATCH_LIMIT}: the gradient is inaccurate. Either f is not the same in both passes (a kernel that is not "
            "deterministic), or its states grew far beyond its first value. Use the adjoint 'implicit', or fewer steps.",
            ReversalWarning,
        )
