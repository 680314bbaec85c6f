#!/usr/bin/env python3
"""Does the forward solve's inverse Jacobian help the adjoint solve (SHINE)? Adjoint evaluations with and without it.

Whole-sequence Broyden ends with -H = prod_j (I + s_{j+1} s_j^T / ||s_j||^2), an estimate of (I - J)^-1, so that -H^T
applied to the cotangent estimates the adjoint's solution. Three starts of one adjoint solve are compared: the cotangent
itself (the first Picard step), the estimate, and the estimate scaled per sequence to the smallest residual. The estimate
costs no evaluation, but keeps the forward history until the backward pass.

Reference: Ramzi, Mannel, Bai, Starck, Ciuciu, Moreau 2022, "SHINE: SHaring the INverse Estimate from the forward pass for
bi-level optimization and implicit models".
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import Any

import torch
from cells import embed, load_benchmark_model, random_cell, token_ids, trained_cell
from measure import benchmark_parser, run_benchmark
from torch import Tensor

from deq_lm.evaluation.tables import markdown_table, write_json
from deq_lm.solvers import Broyden, StoppingRule, solve
from deq_lm.solvers.broyden import StepsState

HISTORY = 64
"""No step of either solve is dropped."""


class KeepingBroyden(Broyden):
    """Whole-sequence Broyden that leaves its last state behind."""

    kept: list[Any]

    def step(self, f: Any, state: Any, active: Tensor | None) -> Any:
        new = super().step(f, state, active)
        self.kept[:] = [new]
        return new


def forward_steps(f: Any, x: Tensor, rtol: float) -> tuple[Tensor, Tensor]:
    """z*, and the steps of the solve oldest first, (m, B, N)."""
    solver = KeepingBroyden(scope="sequence", history_size=HISTORY)
    object.__setattr__(solver, "kept", [])
    solution = solve(f, torch.zeros_like(x), solver=solver, stopping=StoppingRule(max_steps=HISTORY - 2, rtol=rtol))
    (state,) = solver.kept
    assert isinstance(state, StepsState)
    return solution.z, state.steps.rings[0][: len(state.steps), :, 0]


def estimate(steps: Tensor, cotangent: Tensor) -> Tensor:
    """-H^T cotangent, (B, L, D). A sequence's steps count as long as they are not rounding of its longest."""
    squares = steps.square().sum(dim=-1)  # (m, B)
    counts = squares > 1e-10 * squares.amax(dim=0)
    v = cotangent.flatten(1)
    for j in reversed(range(len(steps) - 1)):
        weight = (steps[j + 1] * v).sum(dim=-1) / squares[j]
        v = v + steps[j] * torch.where(counts[j] & counts[j + 1], weight, 0.0)[:, None]
    return v.view_as(cotangent)


def compare(f: Any, x: Tensor, cotangent: Tensor, rtol: float) -> list[dict[str, Any]]:
    z, steps = forward_steps(f, x, rtol)
    with torch.enable_grad():
        z = z.requires_grad_()
        image = f(z)

    def adjoint(u: Tensor) -> Tensor:
        return torch.autograd.grad(image, z, u, retain_graph=True)[0] + cotangent

    shine = estimate(steps, cotangent)
    # u = a shine: residual a (J^T - I) shine + cotangent, smallest where a is the projection of the cotangent
    image_of_shine = (adjoint(shine) - cotangent - shine).flatten(1)
    best = -(image_of_shine * cotangent.flatten(1)).sum(dim=-1) / image_of_shine.square().sum(dim=-1)
    starts = {"cotangent": cotangent, "SHINE": shine, "SHINE, scaled": best[:, None, None] * shine}
    rows = []
    for name, start in starts.items():
        rule = StoppingRule(max_steps=60, rtol=rtol)
        solution = solve(adjoint, start, solver=Broyden(scope="sequence", history_size=HISTORY), stopping=rule)
        rows.append(
            {
                "start": name,
                "rtol": f"{rtol:g}",
                "relative residual of the start": solution.trace.relative_residual[0].mean().item(),
                "mean evaluations": solution.num_evaluations.float().mean().item() + (name == "SHINE, scaled"),
                "max evaluations": int(solution.num_evaluations.max()) + (name == "SHINE, scaled"),
                "converged": f"{int(solution.converged.sum())}/{len(solution.z)}",
            }
        )
    return rows


def measure(arguments: argparse.Namespace) -> None:
    """Compare the starts on both maps, print and write the tables."""
    model = load_benchmark_model(arguments.model, arguments.device)
    input_ids = token_ids(arguments.model, arguments.device)
    x = embed(model, input_ids)
    # The cotangent that training has: of the mean loss, at the equilibrium.
    hidden = replace(StoppingRule(), rtol=1e-4)
    output = model.model(input_ids, stopping=hidden).last_hidden_state.detach().requires_grad_()
    logits = model.lm_head.logits(output, model.model.embed_tokens)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
    (cotangent,) = torch.autograd.grad(loss, output)
    cotangent = cotangent / cotangent.abs().max()
    tables = {}
    maps = {"trained cell": trained_cell(model, input_ids), "random cell": random_cell(model, input_ids)}
    for name, f in maps.items():
        tables[name] = [row for rtol in (1e-1, 1e-2, 1e-3) for row in compare(f, x, cotangent, rtol)]
        print(f"\n## {name}\n\n{markdown_table(tables[name])}", flush=True)
    write_json(arguments.output, {"tables": tables})


def main() -> int:
    return run_benchmark(benchmark_parser(__doc__, "adjoint_reuse"), measure)


if __name__ == "__main__":
    sys.exit(main())
