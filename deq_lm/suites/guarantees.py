"""What is proved of a cell with one equilibrium by construction, beside what was measured of it, on the same solves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deq_lm.cells import BoundCell
from deq_lm.evaluation.token_loss import finite
from deq_lm.solvers import ForwardBackward, PeacemanRachford, StoppingRule, solve
from deq_lm.solvers.operator_splitting import Splitting
from deq_lm.solvers.proximal_form import ProximalForm, proximal_form

SPLITTINGS: tuple[Splitting, ...] = (ForwardBackward(scope="sequence"), PeacemanRachford(scope="sequence"))
MAX_STEPS = 10_000
CLOSE = 1e-6
"""Relative residual of what stands for the solution. In float64: in float32 rounding is as large as the last steps."""


@dataclass(frozen=True, kw_only=True)
class Guarantee:
    """Solves by one splitting, with its proved best step size, from zero.

    Attributes:
        splitting: its name.
        margin: m in I - W >= m I; above 0 the equilibrium is the only one.
        measured_margin: the smallest <d, (I - W) d> / ||d||^2, d from the start to the solution; never below m.
        lipschitz: L >= ||I - W||.
        certified_rate: factor a step by which the distance from the solution is sure to shrink.
        rtol: of the steps below.
        certified_steps: after which every solve is sure to have that relative residual; None if nothing is sure.
        most_steps: that the slowest of the solves has taken.
        largest_share: the most of its own certified steps that a solve has taken; above 1 would disprove the bound.
    """

    splitting: str
    margin: float
    measured_margin: float | None
    lipschitz: float
    certified_rate: float
    rtol: float
    certified_steps: int | None
    most_steps: int
    largest_share: float | None


def measure_guarantees(bound: Iterable[tuple[BoundCell, Tensor]], rtol: float) -> Iterator[Guarantee]:
    """One for each splitting, of a cell that offers its parts; nothing of any other.

    Args:
        bound: f of each segment, and a state of zeros.
        rtol: the relative residual to solve to, that of evaluation.
    """
    forms = [(_in_float64(f), zero.double()) for f, zero in bound if hasattr(f, "proximal_form")]
    for solver in SPLITTINGS if forms else ():
        steps, certified, margins = [], [], []
        for form, zero in forms:
            exact = solve(form, zero, solver=solver, stopping=_to(CLOSE)).z
            solution = solve(form, zero, solver=solver, stopping=_to(rtol))
            steps.append(solution.num_steps)
            certified.append(solver.certified_steps(form, zero, exact, rtol))
            moved = exact - form.affine(exact) + form.affine(zero)  # (I - W) of the way from zero
            margins.append((exact * moved).flatten(1).sum(1) / exact.flatten(1).square().sum(1))
        num_steps, most = torch.cat(steps).double(), torch.cat(certified)
        form = forms[0][0]
        limit = finite(most.max().item())
        yield Guarantee(
            splitting=type(solver).__name__,
            margin=form.margin,
            measured_margin=finite(torch.cat(margins).min().item()),
            lipschitz=float(form.lipschitz),
            certified_rate=solver.rate(form, solver.best_step_size(form)),
            rtol=rtol,
            certified_steps=None if limit is None else int(limit),
            most_steps=int(num_steps.max()),
            largest_share=finite((num_steps / most.clamp(min=1)).max().item()),
        )


def _in_float64(f: BoundCell) -> ProximalForm:
    tensors = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in f.tensors.items()}
    return proximal_form(replace(f, tensors=tensors, dtype=torch.float64))


def _to(rtol: float) -> StoppingRule:
    return StoppingRule(max_steps=MAX_STEPS, rtol=rtol, patience=None, divergence_factor=None)
