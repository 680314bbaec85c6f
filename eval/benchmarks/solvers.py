#!/usr/bin/env python3
"""Our solvers beside TorchDEQ's, in one process on the same maps: evaluations, overhead, memory.

overhead: time of a solve / (calls of f x time of one call alone), medians of interleaved rounds.
states: peak bytes of tensors alive during a solve, f's own left out, as multiples of one state.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from cells import Contraction, embed, load_benchmark_model, random_cell, token_ids, trained_cell
from measure import benchmark_parser, computing_in, count, interleaved_medians, reachable, run_benchmark
from torch import Tensor

from deq_lm.evaluation.peak_memory import peak_live_bytes
from deq_lm.evaluation.tables import markdown_table, write_json
from deq_lm.solvers import Anderson, Broyden, FixedPointSolver, Picard, StoppingRule, solve

try:
    from torchdeq.solver import (  # pyright: ignore[reportMissingImports]  (optional, a peer)
        anderson_solver,
        broyden_solver,
        fixed_point_iter,
    )
except ImportError:
    PEERS: dict[str, Any] = {}
else:
    PEERS = {
        "TorchDEQ broyden": broyden_solver,
        "TorchDEQ anderson": anderson_solver,
        "TorchDEQ fixed_point_iter": fixed_point_iter,
    }

OURS: dict[str, FixedPointSolver] = {
    "Broyden prefix": Broyden(),
    "Broyden sequence": Broyden(scope="sequence"),
    "Anderson prefix": Anderson(),
    "Anderson sequence": Anderson(scope="sequence"),
    "Picard": Picard(),
}
Map = Callable[[Tensor], Tensor]

CALLS = 15
"""Calls of f that are timed together, about as many as a solve has."""


class Counted:
    """f, and how often it was called."""

    def __init__(self, f: Map) -> None:
        self.f, self.num_calls = f, 0

    def __call__(self, z: Tensor) -> Tensor:
        self.num_calls += 1
        return self.f(z)


def runner(
    name: str, z0: Tensor, *, rtol: float, max_steps: int, check_every: int
) -> Callable[[Map], tuple[Tensor, Any]]:
    """f -> (state, mean evaluations a sequence or None) by the solver of that name."""
    if name in OURS:
        stopping = StoppingRule(max_steps=max_steps, rtol=rtol, patience=None, check_every=check_every)

        def ours(f: Map) -> tuple[Tensor, Any]:
            solution = solve(f, z0, solver=OURS[name], stopping=stopping)
            return solution.z, solution.num_evaluations

        return ours

    def theirs(f: Map) -> tuple[Tensor, Any]:
        with torch.no_grad():
            z, *_ = PEERS[name](f, z0, max_iter=max_steps, tol=rtol, stop_mode="rel")
        return z, None

    return theirs


def worst_residual(f: Map, z: Tensor) -> float:
    """Largest relative residual of a sequence."""
    image = f(z).flatten(1)
    return ((image - z.flatten(1)).norm(dim=1) / image.norm(dim=1)).max().item()


def compare(f: Map, z0: Tensor, *, rtol: float, max_steps: int, rounds: int, check_every: int) -> list[dict[str, Any]]:
    """One row a solver on one map."""
    rows: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[], Any]] = {"f": lambda: [f(z0) for _ in range(CALLS)]}
    for name in (*OURS, *PEERS):
        run = runner(name, z0, rtol=rtol, max_steps=max_steps, check_every=check_every)
        counted = Counted(f)
        z, evaluations = run(counted)
        rows[name] = {
            "solver": name,
            "calls of f": counted.num_calls,
            "mean evaluations a sequence": None if evaluations is None else evaluations.float().mean().item(),
            "worst relative residual": worst_residual(f, z),
        }
        runs[name] = lambda run=run: run(f)
    with torch.no_grad():
        seconds = interleaved_medians(runs, rounds=rounds, device=z0.device)
    seconds["f"] /= CALLS
    for name, row in rows.items():
        alone = row["calls of f"] * seconds["f"]
        row["ms"] = 1e3 * seconds[name]
        row["overhead"] = seconds[name] / alone
        row["own ms an evaluation"] = 1e3 * (seconds[name] - alone) / row["calls of f"]
    return list(rows.values())


def states(shape: tuple[int, ...], device: torch.device, budgets: tuple[int, ...]) -> list[dict[str, Any]]:
    """Peak bytes of each solver at step budgets that are used up, in states of that shape."""
    torch.manual_seed(0)
    x = torch.randn(shape, device=device)
    factors = torch.linspace(-0.99, 0.99, shape[-1], device=device)

    def f(z: Tensor) -> Tensor:  # one operation, one new state
        return torch.addcmul(x, z, factors)

    z0 = torch.zeros_like(x)
    size = x.numel() * x.element_size()
    rows = []
    for name in (*OURS, *PEERS):
        row: dict[str, Any] = {"solver": name}
        for budget in budgets:
            run = runner(name, z0, rtol=0.0, max_steps=budget, check_every=1)
            row[f"states at budget {budget}"] = peak_live_bytes(lambda run=run: run(f)) / size
        rows.append(row)
    return rows


def measure(arguments: argparse.Namespace) -> None:
    """Run all solvers on all maps, print and write the tables."""
    device = arguments.device
    check_every = arguments.check_every or (4 if device.type == "cuda" else 1)
    model = load_benchmark_model(arguments.model, device)
    if not PEERS:
        print("torchdeq is not installed (pip install --no-deps torchdeq): its rows are missing", file=sys.stderr)
    input_ids = token_ids(arguments.model, device)
    x = embed(model, input_ids)
    maps: Mapping[str, Map] = {
        "trained cell": trained_cell(model, input_ids),
        "random cell": random_cell(model, input_ids),
        "tanh(z W + x)": Contraction(x),
    }
    tables: dict[str, list[dict[str, Any]]] = {}
    for name, f in maps.items():
        for rtol in (1e-3,) if name == "random cell" else (1e-3, 1e-4):  # it takes everyone too long to 1e-4
            title = f"{name}, relative residual {rtol:g}"
            tables[title] = compare(
                f, torch.zeros_like(x), rtol=rtol, max_steps=80, rounds=arguments.rounds, check_every=check_every
            )
            print(f"\n## {title}\n\n{markdown_table(tables[title])}", flush=True)
    for precision in arguments.precision:
        if precision != "float32":
            rtol = reachable(1e-3, precision)
            title = f"trained cell in {precision}, relative residual {rtol:g}"
            with computing_in(precision, device):
                f = trained_cell(model, input_ids)
                tables[title] = compare(
                    f, torch.zeros_like(x), rtol=rtol, max_steps=80, rounds=arguments.rounds, check_every=check_every
                )
            print(f"\n## {title}\n\n{markdown_table(tables[title])}", flush=True)
    tables["memory"] = states(tuple(x.shape), device, (30, 300))
    print(f"\n## memory\n\n{markdown_table(tables['memory'])}")
    shape = {"batch": x.shape[0], "length": x.shape[1], "d_model": x.shape[2], "threads": torch.get_num_threads()}
    write_json(arguments.output, {"shape": shape, "check_every": check_every, "tables": tables})


def main() -> int:
    parser = benchmark_parser(__doc__, "solvers")
    parser.add_argument(
        "--check-every", type=count, help="steps between questions to the device; default: 1, on a GPU 4"
    )
    return run_benchmark(parser, measure)


if __name__ == "__main__":
    sys.exit(main())
