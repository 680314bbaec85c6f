#!/usr/bin/env python3
"""How exactly a reversible solve can be run backwards: in floating point as published, and on the lattice of deq_lm."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

EPILOG = """examples:
  python eval/benchmarks/reversible.py
  python eval/benchmarks/reversible.py --steps 8 16 --output reversible.json

columns:
  state       largest distance of a state met on the way back from the one of the forward solve, relative to its norm
  gradient    distance of the gradient from that of the same solve with all its steps recorded, relative to its norm
  published   the pair in the dtype of f, f evaluated with a graph on the way back only (other attention kernels)
  same f      the same with f evaluated alike both ways
  float64     the same with the pair in float64
  lattice     the solver Reversible with the adjoint Reversed
  kept        bytes kept for the backward pass, beside the inputs of f, by the lattice and by recording every step

A step is one evaluation; the published pair iteration makes two in one step.

exit codes: 0 done; 2 a mistake in the call.
"""
STEPS = (4, 8, 16, 24, 32, 64)
RELAXATIONS = (0.5, 0.8)


@dataclass(frozen=True)
class Row:
    """One map, dtype, relaxation and number of steps; errors by method are (state, gradient), null if not finite."""

    map: str
    dtype: str
    relaxation: float
    num_steps: int
    errors: dict[str, tuple[float | None, float | None]]
    kept_bytes: int
    recorded_bytes: int


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="eval/benchmarks/reversible.py",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = Path("results/reversible.json")
    parser.add_argument("--output", type=Path, default=default, help=f"JSON file to write; default: {default}")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, help="numbers of evaluations after the first")
    parser.add_argument("--threads", type=int, default=1, help="of torch; default: 1")
    arguments = parser.parse_args()
    if min(arguments.steps) < 1:
        parser.error(f"--steps {min(arguments.steps)}: expected 1 or more")
    available = os.cpu_count() or 1
    if not 1 <= arguments.threads <= available:
        parser.error(f"--threads {arguments.threads}: expected 1 to {available}, the processors of this machine")

    import torch
    from measure import check_own_output

    from deq_lm.errors import DataError, in_one_line
    from deq_lm.evaluation.records import environment

    try:
        check_own_output(arguments.output)
    except (DataError, OSError) as error:
        parser.error(in_one_line(str(error)))
    torch.set_num_threads(arguments.threads)
    rows = [
        measure(name, dtype, relaxation, num_steps)
        for name in ("transformer_xl", "contraction")
        for dtype in ("float32", "float64")
        for relaxation in RELAXATIONS
        for num_steps in arguments.steps
    ]
    result = {"rows": [asdict(row) for row in rows], "environment": environment()}
    arguments.output.parent.mkdir(exist_ok=True)
    aside = arguments.output.with_name(f".{arguments.output.name}.incomplete")
    aside.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(aside, arguments.output)
    print(table(rows))
    return 0


def measure(name: str, dtype: str, relaxation: float, num_steps: int) -> Row:
    """All methods on the same map from the same start."""
    import torch

    from deq_lm.adjoints import Reversed, Unrolled
    from deq_lm.evaluation.peak_memory import saved_bytes
    from deq_lm.solvers import Reversible, StoppingRule, solve

    kind = getattr(torch, dtype)
    f, like = make_map(name, kind)
    cotangent = torch.randn(like.shape, generator=torch.Generator().manual_seed(1), dtype=kind)
    z0 = torch.zeros_like(like)
    errors = {
        "published": float_errors(f, z0, relaxation, num_steps, cotangent, kind, same=False),
        "same f": float_errors(f, z0, relaxation, num_steps, cotangent, kind, same=True),
        "float64": float_errors(f, z0, relaxation, num_steps, cotangent, torch.float64, same=True),
    }

    watched = Watched(f, [])
    run = partial(solve, solver=Reversible(relaxation=relaxation), stopping=StoppingRule.fixed(num_steps))
    output, _ = Reversed().apply(watched, z0, run)
    there = watched.visited.copy()
    watched.visited.clear()
    found = torch.autograd.grad(output, f.inputs, cotangent)
    back = watched.visited[::-1]
    wanted = torch.autograd.grad(Unrolled().apply(f, z0, run)[0], f.inputs, cotangent)
    errors["lattice"] = (worst_distance(back, there), finite(distance(found, wanted)))
    kept, recorded = (
        saved_bytes(lambda a=adjoint: a.apply(f, z0, run), besides=f.inputs) for adjoint in (Reversed(), Unrolled())
    )
    return Row(name, dtype, relaxation, num_steps, errors, kept, recorded)


def make_map(name: str, dtype: Any) -> tuple[Any, Any]:
    """A random map with differentiable inputs, and its injection (B, L, D)."""
    import torch

    from deq_lm.cells.base import Autocast, BoundCell
    from deq_lm.cells.transformer_xl import TransformerXLCell, TransformerXLConfig

    torch.manual_seed(0)
    x = torch.randn(4, 64, 64, dtype=torch.float64).to(dtype).requires_grad_()
    if name == "transformer_xl":
        config = TransformerXLConfig(d_model=64, num_heads=4, d_inner=256, mem_len=0, init_std=0.1)
        cell = TransformerXLCell(config).to(dtype)
        f = cell.bind(x)
        inputs = [
            tensor.detach().requires_grad_() for tensor in f.inputs
        ]  # leaves: the way to the weights is not measured
        return f.with_inputs(inputs), x
    weight = torch.randn(64, 64, dtype=torch.float64)
    weight = (0.9 * weight / torch.linalg.matrix_norm(weight, 2)).to(dtype).requires_grad_()
    tensors = {"weight": weight, "x": x}
    return BoundCell(
        lambda z, t: (z @ t["weight"] + t["x"]).tanh(), tensors, {"x": 0}, dtype, Autocast.current("cpu")
    ), x


@dataclass(frozen=True)
class Watched:
    """A map that keeps a copy of every state it is evaluated at."""

    f: Any
    visited: list[Any]

    @property
    def inputs(self) -> tuple[Any, ...]:
        return self.f.inputs

    def with_inputs(self, inputs: Sequence[Any], /) -> "Watched":
        return Watched(self.f.with_inputs(inputs), self.visited)

    def __call__(self, z: Any, /) -> Any:
        self.visited.append(z.detach().clone())
        return self.f(z)


def float_errors(
    f: Any, z0: Any, relaxation: float, num_steps: int, cotangent: Any, state_dtype: Any, *, same: bool
) -> tuple[float | None, float | None]:
    """Errors of the iteration undone by division, w_{k-1} = (w_{k+1} - relaxation f(w_k)) / (1 - relaxation)."""
    import torch

    def evaluate(w: Any) -> Any:
        with torch.no_grad():
            return f(w.to(z0.dtype)).to(state_dtype)

    def evaluate_with_graph(w: Any) -> Any:
        return f(w.to(z0.dtype).requires_grad_()).detach().to(state_dtype)

    start = z0.to(state_dtype)
    there = [start, start]  # w_{-1}, w_0, ...
    for _ in range(num_steps):
        there.append((1 - relaxation) * there[-2] + relaxation * evaluate(there[-1]))
    back = there[-2:]
    step_back = evaluate if same else evaluate_with_graph
    for _ in range(num_steps):
        back.insert(0, (back[1] - relaxation * step_back(back[0])) / (1 - relaxation))
    wanted, found = (gradient(f, w[1:], relaxation, cotangent, z0.dtype) for w in (there, back))
    return worst_distance(back[1:], there[1:]), finite(distance(found, wanted))


def gradient(f: Any, states: Sequence[Any], relaxation: float, cotangent: Any, dtype: Any) -> list[Any]:
    """Of <cotangent, f(w_n)> with respect to the inputs of f, by backpropagation with f linearized at given states."""
    import torch

    totals = [torch.zeros_like(tensor) for tensor in f.inputs]
    latest, previous = torch.zeros_like(cotangent), torch.zeros_like(cotangent)
    weight = cotangent
    for w in reversed(states):
        z = w.to(dtype).requires_grad_()
        grad_z, *gradients = torch.autograd.grad(f(z), [z, *f.inputs], weight, materialize_grads=True)
        totals = [total + one for total, one in zip(totals, gradients, strict=True)]
        latest, previous = previous + grad_z, (1 - relaxation) * latest
        weight = relaxation * latest
    return totals


def distance(found: Sequence[Any], wanted: Sequence[Any]) -> float:
    """Relative to the norm of `wanted`, all tensors together."""
    import torch

    norm: Callable[[Sequence[Any]], Any] = lambda tensors: torch.stack([t.norm() for t in tensors]).norm()  # noqa: E731
    return (norm([a - b for a, b in zip(found, wanted, strict=True)]) / norm(wanted)).item()


def worst_distance(back: Sequence[Any], there: Sequence[Any]) -> float | None:
    """Largest distance of a state from its twin, relative to the last state: the first one may be zero."""
    scale = there[-1].norm()
    return finite(max(((a - b).norm() / scale).item() for a, b in zip(back, there, strict=True)))


def finite(value: float) -> float | None:
    """JSON knows no infinity."""
    return value if value < float("inf") else None


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    methods = list(rows[0].errors)
    lines = [
        "| map | dtype | relaxation | steps | " + " | ".join(f"{m}: state, gradient" for m in methods) + " | kept MB |",
        "|---|---|---|---|" + "---|" * (len(methods) + 1),
    ]
    for row in rows:
        cells = [", ".join("inf" if e is None else f"{e:.0e}" if e else "0" for e in row.errors[m]) for m in methods]
        lines.append(
            f"| {row.map} | {row.dtype} | {row.relaxation} | {row.num_steps} | {' | '.join(cells)} | "
            f"{row.kept_bytes / 1e6:.2f} ({row.recorded_bytes / 1e6:.1f}) |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
