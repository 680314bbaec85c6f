#!/usr/bin/env python3
"""Is a segment's solve shorter if it begins where that of the segment before ended? Evaluations by start.

Every segment of a few streams is solved from zero, which is where training begins, and from three starts made of the
equilibrium of the segment before. Memory is always that of the model's own solves.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from cells import BATCH, embed, load_benchmark_model, token_ids
from measure import benchmark_parser, count, run_benchmark
from torch import Tensor

from deq_lm.equilibrium import Equilibrium
from deq_lm.evaluation.tables import markdown_table, write_json
from deq_lm.modeling import DEQLMForCausalLM
from deq_lm.solvers import Solution, StoppingRule, solve

STARTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "zero": torch.zeros_like,
    "the same position of the segment before": lambda z: z,
    "the last position of the segment before": lambda z: z[:, -1:].expand_as(z),
    "the mean of the segment before": lambda z: z.mean(dim=1, keepdim=True).expand_as(z),
}
"""From the equilibrium of the segment before, (B, L, D)."""


@torch.no_grad()
def solves(model: DEQLMForCausalLM, input_ids: Tensor, length: int, rtol: float) -> dict[str, list[Solution]]:
    """By start, the solves of the segments of `input_ids`, (B, length x (1 + segments)); the first follows none."""
    layers = model.model.layers
    assert isinstance(layers, Equilibrium)
    stopping = StoppingRule(max_steps=60, rtol=rtol)
    found: dict[str, list[Solution]] = {name: [] for name in STARTS}
    memory, before = None, None
    for segment in input_ids.split(length, dim=1):
        f = layers.cell.bind(embed(model, segment), memory)
        if before is not None:
            for name, start in STARTS.items():
                found[name].append(solve(f, start(before).contiguous(), solver=layers.solver, stopping=stopping))
        output = model(segment, memory=memory, stopping=stopping)
        memory, before = output.memory, output.solution.z
    return found


def row(name: str, rtol: float, found: list[Solution]) -> dict[str, Any]:
    evaluations = torch.cat([solution.num_evaluations for solution in found])
    converged = torch.cat([solution.converged for solution in found])
    first = torch.cat([solution.trace.relative_residual[0] for solution in found])
    return {
        "start": name,
        "rtol": f"{rtol:g}",
        "relative residual of the start": first.mean().item(),
        "mean evaluations": evaluations.float().mean().item(),
        "max evaluations": int(evaluations.max()),
        "converged": f"{int(converged.sum())}/{len(converged)}",
    }


def measure(arguments: argparse.Namespace) -> None:
    """Compare the starts, print and write the table."""
    model = load_benchmark_model(arguments.model, arguments.device)
    input_ids = token_ids(arguments.model, arguments.device, length=arguments.length * (1 + arguments.segments))
    rows = [
        row(name, rtol, found)
        for rtol in (1e-2, 1e-3)
        for name, found in solves(model, input_ids, arguments.length, rtol).items()
    ]
    print(markdown_table(rows))
    shape = {"batch": BATCH, "length": arguments.length, "segments": arguments.segments}
    write_json(arguments.output, {"model": str(arguments.model), "shape": shape, "tables": {"starts": rows}})


def main() -> int:
    parser = benchmark_parser(__doc__, "starts")
    parser.add_argument("--length", type=count, default=64, help="positions of a segment; default: 64")
    parser.add_argument("--segments", type=count, default=20, help="of a stream, after a first one; default: 20")
    return run_benchmark(parser, measure)


if __name__ == "__main__":
    sys.exit(main())
