#!/usr/bin/env python3
"""A training step on one trained cell: unrolled, checkpointed, our adjoints, TorchDEQ's; time, memory, gradient error.

A step is a forward pass, and the gradient of sum(output * cotangent) with respect to the cell's weights, all from one
start. Gradient error: relative, against the equilibrium's gradient in float64 with both solves to 1e-9.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from cells import cell_of, embed, load_benchmark_model, token_ids
from measure import benchmark_parser, computing_in, count, interleaved_medians, reachable, run_benchmark, tolerance
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from deq_lm.adjoints import Adjoint, Implicit, JacobianFree, Phantom, Unrolled
from deq_lm.cells.base import BoundCell, Cell
from deq_lm.evaluation.peak_memory import peak_live_bytes, saved_bytes
from deq_lm.evaluation.tables import markdown_table, write_json
from deq_lm.solvers import Anderson, Broyden, FixedPointSolver, Picard, StoppingRule, solve

try:
    from torchdeq import get_deq  # pyright: ignore[reportMissingImports]  (optional, a peer)
except ImportError:
    get_deq = None

SEQUENCE_BROYDEN = Broyden(scope="sequence")


class Counters:
    """Evaluations of f, and products with its transposed Jacobian."""

    def __init__(self) -> None:
        self.evaluations = self.products = 0


class _CountProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, counters: Counters) -> Tensor:
        ctx.counters = counters
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.counters.products += 1
        return grad_outputs[0], None


@dataclass(frozen=True)
class Problem:
    """What every variant differentiates."""

    cell: Cell
    x: Tensor
    cotangent: Tensor

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.cell.parameters())

    def bind(self, counters: Counters | None = None) -> BoundCell:
        """f; with counters, one that counts."""
        f = self.cell.bind(self.x)
        if counters is None:
            return f

        def counted(z: Tensor, tensors: Any) -> Tensor:
            counters.evaluations += 1
            return f.evaluate(_CountProducts.apply(z, counters), tensors)

        return replace(f, evaluate=counted)

    def gradient(
        self, forward: Callable[[BoundCell, Tensor], Tensor], counters: Counters | None = None
    ) -> list[Tensor]:
        output = forward(self.bind(counters), torch.zeros_like(self.x))
        return list(torch.autograd.grad(output, self.parameters, self.cotangent))


Forward = Callable[[BoundCell, Tensor], Tensor]


def ours(adjoint: Adjoint, solver: FixedPointSolver, rule: StoppingRule) -> Forward:
    return lambda f, z0: adjoint.apply(f, z0, partial(solve, solver=solver, stopping=rule))[0]


def unrolled(depth: int) -> Forward:
    return ours(Unrolled(), Picard(), StoppingRule.fixed(depth - 1))


def checkpointed(depth: int) -> Forward:
    """Every evaluation recomputed in the backward pass; weights stay inputs of the closure, as in any layer."""

    def forward(f: BoundCell, z: Tensor) -> Tensor:
        for _ in range(depth):
            z = checkpoint(f, z, use_reentrant=False)  # pyright: ignore[reportAssignmentType]
        return z

    return forward


def peer(solver: str, *, rtol: float, max_steps: int, grad: int | None = None) -> Forward:
    assert get_deq is not None
    deq = get_deq(
        f_solver=solver,
        b_solver=solver,
        f_max_iter=max_steps,
        b_max_iter=max_steps,
        f_tol=rtol,
        b_tol=rtol,
        f_stop_mode="rel",
        b_stop_mode="rel",
        **({"ift": True} if grad is None else {"grad": grad, "tau": 0.8}),
    )
    return lambda f, z0: deq(f, z0)[0][-1]


def variants(rtol: float, max_steps: int) -> dict[str, Forward]:
    rule = StoppingRule(max_steps=max_steps, rtol=rtol)
    depths = (12, max_steps)
    table = {f"unrolled {depth}": unrolled(depth) for depth in depths}
    table |= {f"checkpointed {depth}": checkpointed(depth) for depth in depths}
    for name, solver, adjoint_solver in [
        ("Broyden prefix (the default)", Broyden(), Implicit().solver),
        ("Broyden sequence", SEQUENCE_BROYDEN, Implicit().solver),
        ("Broyden prefix, adjoint too", Broyden(), Broyden()),
        ("Anderson prefix, adjoint too", Anderson(), Anderson()),
        ("Picard, adjoint too", Picard(), Picard()),
    ]:
        table[f"implicit: {name}"] = ours(Implicit(solver=adjoint_solver, stopping=rule), solver, rule)
    table["Jacobian-free: Broyden prefix"] = ours(JacobianFree(), Broyden(), rule)
    table["phantom 5: Broyden prefix"] = ours(Phantom(num_steps=5), Broyden(), rule)
    if get_deq is not None:
        for solver in ("broyden", "anderson", "fixed_point_iter"):
            table[f"TorchDEQ implicit, {solver}"] = peer(solver, rtol=rtol, max_steps=max_steps)
        table["TorchDEQ phantom 5, broyden"] = peer("broyden", rtol=rtol, max_steps=max_steps, grad=5)
    return table


def exact_gradient(problem: Problem) -> list[Tensor]:
    """Of the equilibrium, in float64."""
    wide = Problem(problem.cell.double(), problem.x.double(), problem.cotangent.double())
    rule = StoppingRule(max_steps=500, rtol=1e-9, patience=100)
    gradient = wide.gradient(ours(Implicit(solver=SEQUENCE_BROYDEN, stopping=rule), SEQUENCE_BROYDEN, rule))
    problem.cell.float()
    return gradient


def relative_error(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Of all gradients as one vector."""
    difference = sum((a.double() - b.double()).square().sum() for a, b in zip(found, wanted, strict=True))
    return (difference / sum(b.double().square().sum() for b in wanted)).sqrt().item()  # pyright: ignore[reportAttributeAccessIssue]


def measure_steps(
    problem: Problem, exact: list[Tensor], rtol: float, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each kind of step, with both solves to the same tolerance."""
    forwards = variants(rtol, arguments.max_steps)
    seconds = interleaved_medians(
        {name: partial(problem.gradient, forward) for name, forward in forwards.items()},
        rounds=arguments.rounds,
        device=torch.device(arguments.device),
    )
    rows = []
    for name, forward in forwards.items():
        counters = Counters()
        found = problem.gradient(forward, counters)
        run = partial(problem.gradient, forward)
        is_unrolled = name.startswith(("unrolled", "checkpointed"))
        rows.append(
            {
                "step": name,
                "ms": 1e3 * seconds[name],
                "x unrolled 12": seconds[name] / seconds["unrolled 12"],
                "evaluations": counters.evaluations,
                "products": counters.products,
                "saved MB": saved_bytes(run, besides=[*problem.parameters, problem.x]) / 1e6,
                "peak MB": peak_live_bytes(run) / 1e6,
                "gradient error": None if is_unrolled else relative_error(found, exact),
            }
        )
    return rows


def measure(arguments: argparse.Namespace) -> None:
    """Measure every way to take the step at every tolerance, print and write the tables."""
    device = arguments.device
    model = load_benchmark_model(arguments.model, device)
    if get_deq is None:
        print("torchdeq is not installed (pip install --no-deps torchdeq): its rows are missing", file=sys.stderr)
    x = embed(model, token_ids(arguments.model, device))
    torch.manual_seed(0)
    problem = Problem(cell_of(model).train(), x, torch.randn_like(x))
    exact = exact_gradient(problem)
    tables = {}
    for rtol, precision in product(arguments.rtol, arguments.precision):
        asked = reachable(rtol, precision)
        title = f"relative residual {asked:g}, at most {arguments.max_steps} steps"
        title += "" if precision == "float32" else f", {precision}"
        with computing_in(precision, device):
            tables[title] = measure_steps(problem, exact, asked, arguments)
        print(f"\n## {title}\n\n{markdown_table(tables[title])}", flush=True)
    shape = {"batch": x.shape[0], "length": x.shape[1], "d_model": x.shape[2], "threads": torch.get_num_threads()}
    write_json(arguments.output, {"shape": shape, "tables": tables})


def main() -> int:
    parser = benchmark_parser(__doc__, "training_step")
    parser.add_argument("--max-steps", type=count, default=30, help="budget of both solves, and the deeper unroll")
    parser.add_argument(
        "--rtol", type=tolerance, nargs="+", default=[1e-3], help="tolerances of both solves; default: 1e-3"
    )
    return run_benchmark(parser, measure)


if __name__ == "__main__":
    sys.exit(main())
