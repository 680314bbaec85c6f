#!/usr/bin/env python3
"""The monotone cell's promises, measured: convergence within the proved bounds, one solution, steps against step size.

Cells of random and of adversarially scaled weights (some parts of W a thousand times larger or smaller, taps that all push
one way, delta at the ends of its range; no limit to A and B), widths 4 to 16, sequences of 1 to 1,024 positions with
memory, all activations. Each is solved by both splittings, each from a start of its own, of size 0.01 to 1,000. A and B are
scaled down where L / m would be above LARGEST_CONDITION: forward-backward needs steps in its square.

steps / bound: steps until ||f(z) - z|| <= 1e-6 ||f(z)|| over those after which theory is sure of it
    (`Splitting.certified_steps`).
apart: largest distance between the two methods' results, relative to their norm, or to that of u where they are zero.

With --runs, also the share of converged solves over training, of run folders NAME=FOLDER.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from measure import count, default_output, run_benchmark, threads
from torch import Tensor

from deq_lm.cells import Memory, MonotoneCell, MonotoneConfig
from deq_lm.cells.proximal_map import ProximalMap
from deq_lm.errors import DataError
from deq_lm.evaluation.tables import markdown_table, write_json
from deq_lm.reporting.plots import curves
from deq_lm.reporting.report import write_figure
from deq_lm.solvers import ForwardBackward, PeacemanRachford, Solution, StoppingRule, solve
from deq_lm.solvers.operator_splitting import Splitting

RTOL = 1e-6
LARGEST_CONDITION = 10.0
MAX_STEPS = 20_000
STEP_SIZES = range(-8, 17)
"""Powers of the square root of 2, in proved limits of forward-backward."""

SPLITTINGS: dict[str, Splitting] = {
    "forward-backward": ForwardBackward(scope="sequence"),
    "Peaceman-Rachford": PeacemanRachford(scope="sequence"),
}


@dataclass(frozen=True)
class Draw:
    """One cell, sequence and pair of starts. Counts are by method, in the order of SPLITTINGS."""

    family: str
    seed: int
    prox: str
    width: int
    num_taps: int
    length: int
    margin: float
    lipschitz: float
    converged: list[bool]
    steps: list[int]
    bounds: list[int]
    apart: float


EPILOG = """examples:
  python eval/benchmarks/monotone.py --draws 100 --adversarial 10 --longest 256 --output quick.json
  python eval/benchmarks/monotone.py --jobs 2 --runs monotone=runs/demo_cpu_monotone Transformer-XL=runs/demo_cpu

exit codes: 0 done; 2 a mistake in the call, or no such run.
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="eval/benchmarks/monotone.py",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = default_output("monotone")
    parser.add_argument("--output", type=Path, default=default, help="plots are written beside it; default: results/")
    parser.add_argument("--draws", type=count, default=1000, help="random weights; default: 1000")
    parser.add_argument("--adversarial", type=count, default=100, help="adversarially scaled weights; default: 100")
    parser.add_argument("--longest", type=count, default=1024, help="positions of the longest sequence; default: 1024")
    parser.add_argument(
        "--jobs", type=threads, default=1, help="processes that solve draws, one thread each; default: 1"
    )
    parser.add_argument("--runs", nargs="*", default=[], metavar="NAME=FOLDER", help="training runs to compare")
    parser.set_defaults(threads=1)
    return run_benchmark(parser, run_all)


def run_all(arguments: argparse.Namespace) -> None:
    """Solve all draws, print and write the tables and plots."""
    training = [row for run in arguments.runs for row in convergence_over_training(run)]
    plan = [("random", seed) for seed in range(arguments.draws)]
    plan += [("adversarial", seed) for seed in range(arguments.adversarial)]
    families, seeds = zip(*plan, strict=True)
    longest = [arguments.longest] * len(plan)
    if arguments.jobs == 1:
        draws = list(map(measure, families, seeds, longest))
    else:
        with ProcessPoolExecutor(arguments.jobs) as pool:
            draws = list(pool.map(measure, families, seeds, longest, chunksize=5))
    sweep = list(against_step_size())
    tables = {
        "convergence": list(summary(draws)),
        "steps against step size": sweep,
        "convergence over training": [
            summary_of_run(training, name) for name in dict.fromkeys(r["run"] for r in training)
        ],
    }
    for title, rows in tables.items():
        print(f"\n{title}\n\n{markdown_table(rows)}")
    write_json(
        arguments.output, {"tables": tables, "hardest": [asdict(draw) for draw in hardest(draws)], "training": training}
    )
    write_figure(lambda: plot_of_steps(sweep), arguments.output.with_name("monotone_step_size.svg"))
    if training:
        write_figure(lambda: plot_of_training(training), arguments.output.with_name("monotone_training.svg"))


@torch.no_grad()
def measure(family: str, seed: int, longest: int) -> Draw:
    """Draw and solve one; the same for the same seed."""
    generator = random.Random(f"{family} {seed}")  # noqa: S311  (a draw of numbers, no secret)
    torch.manual_seed(generator.randrange(2**31))
    width, num_taps = generator.choice((4, 8, 16)), generator.randrange(5)
    config = MonotoneConfig(
        d_model=width,
        num_heads=2,
        num_taps=num_taps,
        margin=10 ** generator.uniform(-1, 0.3),
        max_feedback=None,
        prox=generator.choice(("relu", "soft_threshold", "tanh")),  # pyright: ignore[reportArgumentType]
        init_std=10 ** generator.uniform(-1.5, 0.5),
    )
    cell = MonotoneCell(config).double().eval()
    if family == "adversarial":
        scale_adversarially(cell, generator)
    tame(cell)
    length = longest if seed % 20 == 0 else round(longest ** generator.random())
    x, past, past_x = (torch.randn(1, n, width, dtype=torch.float64) for n in (length, 4, 4))
    form = cell.bind(x, Memory(past, past_x)).proximal_form
    starts = [10 ** generator.uniform(-2, 3) * torch.randn_like(x) for _ in SPLITTINGS]
    solutions = [solved(form, solver, z0, 1e-2 * RTOL) for solver, z0 in zip(SPLITTINGS.values(), starts, strict=True)]
    best = solutions[-1].z
    return Draw(
        family=family,
        seed=seed,
        prox=config.prox,
        width=width,
        num_taps=num_taps,
        length=length,
        margin=config.margin,
        lipschitz=float(form.lipschitz),
        converged=[bool(solution.converged.all()) for solution in solutions],
        steps=[steps_to_tolerance(solution) for solution in solutions],
        bounds=[bound(form, solver, z0, best) for solver, z0 in zip(SPLITTINGS.values(), starts, strict=True)],
        apart=float((solutions[0].z - best).norm() / (form.offset if is_zero(form, best) else best).norm()),
    )


def scale_adversarially(cell: MonotoneCell, generator: random.Random) -> None:
    """In place: parts of very different sizes, or taps chosen against the bound."""
    for parameter in (cell.damping, cell.rotation, cell.taps):
        parameter.mul_(10 ** generator.uniform(-3, 3))
    cell.mixing_logit.fill_(generator.choice((-30.0, 0.0, 30.0)))
    kind = generator.randrange(3)
    if kind == 1:
        cell.taps.copy_(cell.taps.abs().amax() * torch.ones_like(cell.taps)) if cell.taps.numel() else None
    elif kind == 2:
        cell.taps.copy_(cell.taps.abs().amax() * torch.eye(cell.taps.shape[-1]).double()) if cell.taps.numel() else None


def tame(cell: MonotoneCell) -> None:
    """In place: A and B smaller, until L <= LARGEST_CONDITION m. Where delta alone is too much, taps have less room."""
    while float(cell.operator()[1]) > LARGEST_CONDITION * cell.config.margin:
        cell.damping.mul_(0.7)
        cell.rotation.mul_(0.7)
        if max(cell.damping.abs().max(), cell.rotation.abs().max()) < 1e-3:
            cell.mixing_logit.sub_(0.5)


def solved(form: ProximalMap, solver: Splitting, z0: Tensor, rtol: float) -> Solution:
    rule = StoppingRule(max_steps=MAX_STEPS, rtol=rtol, atol=1e-12, patience=None, divergence_factor=None)
    return solve(form, z0, solver=solver, stopping=rule)


def steps_to_tolerance(solution: Solution) -> int:
    """Steps until the relative residual is first at most RTOL; all of them if it never is."""
    reached = (solution.trace.relative_residual[:, 0] <= RTOL).nonzero()
    return int(reached[0]) if len(reached) else int(solution.num_steps.max())


def bound(form: ProximalMap, solver: Splitting, z0: Tensor, z_star: Tensor) -> int:
    """Steps after which theory is sure that the relative residual is at most RTOL."""
    if is_zero(form, z_star):  # no relative residual is ever small
        return MAX_STEPS
    return int(solver.certified_steps(form, z0, z_star, RTOL))


def is_zero(form: ProximalMap, z_star: Tensor) -> bool:
    return bool(z_star.norm() <= 1e-9 * form.offset.norm())


def summary(draws: Sequence[Draw]) -> Iterator[dict[str, Any]]:
    for family in dict.fromkeys(draw.family for draw in draws):
        own = [draw for draw in draws if draw.family == family]
        for i, name in enumerate(SPLITTINGS):
            yield {
                "weights": family,
                "draws": len(own),
                "splitting": name,
                "converged": sum(draw.converged[i] for draw in own),
                "within the bound": sum(draw.steps[i] <= draw.bounds[i] for draw in own),
                "median steps": statistics.median(draw.steps[i] for draw in own),
                "most steps": max(draw.steps[i] for draw in own),
                "largest steps / bound": max(draw.steps[i] / max(1, draw.bounds[i]) for draw in own),
                "farthest apart": max(draw.apart for draw in own),
            }


def hardest(draws: Sequence[Draw], num_draws: int = 20) -> list[Draw]:
    """Those that came closest to their bound by either method; any draw can be made again from its family and seed."""

    def closeness(draw: Draw) -> float:
        return max(steps / max(1, bound) for steps, bound in zip(draw.steps, draw.bounds, strict=True))

    return sorted(draws, key=closeness, reverse=True)[:num_draws]


@torch.no_grad()
def against_step_size() -> Iterator[dict[str, Any]]:
    """One cell, steps to RTOL by step size; None where 3,000 are not enough."""
    torch.manual_seed(0)
    cell = MonotoneCell(MonotoneConfig(d_model=32, margin=0.5, init_std=0.1)).double().eval()
    form = cell.bind(torch.randn(4, 64, 32, dtype=torch.float64)).proximal_form
    limit = 2 * form.margin / float(form.lipschitz) ** 2
    rule = StoppingRule(max_steps=3000, rtol=RTOL, patience=None, divergence_factor=1e6)
    for i in STEP_SIZES:
        step_size = limit * 2 ** (i / 2)
        row: dict[str, Any] = {"step size": step_size, "step / proved limit": step_size / limit}
        for name, solver in SPLITTINGS.items():
            same = type(solver)(step_size=step_size, scope="sequence")
            solution = solve(form, torch.zeros_like(form.offset), solver=same, stopping=rule)
            row[name] = int(solution.num_steps.max()) if solution.converged.all() else None
        yield row


def convergence_over_training(run: str) -> Iterator[dict[str, Any]]:
    """The training lines of a run, NAME=FOLDER."""
    name, equals, folder = run.partition("=")
    if not equals:
        raise DataError(f"--runs {run}: expected NAME=FOLDER.")
    for line in (Path(folder) / "metrics.jsonl").read_text("utf-8").splitlines():
        record = json.loads(line)
        if record["kind"] == "train":
            yield {
                "run": name,
                "step": record["step"],
                "share converged": record["solver_share_converged"],
                "adjoint share converged": record["adjoint_share_converged"],
                "evaluations": record["solver_evaluations"],
                "nats per token": record["loss"],
            }


def summary_of_run(training: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    rows = [row for row in training if row["run"] == name]
    return {
        "run": name,
        "steps": rows[-1]["step"],
        "converged, all": statistics.fmean(row["share converged"] for row in rows),
        "converged, worst stretch": min(row["share converged"] for row in rows),
        "adjoint converged, all": statistics.fmean(row["adjoint share converged"] for row in rows),
        "evaluations, last": rows[-1]["evaluations"],
        "nats per token, last": rows[-1]["nats per token"],
    }


def plot_of_steps(sweep: Sequence[dict[str, Any]]) -> Any:
    lines = {name: [(row["step size"], row[name]) for row in sweep if row[name] is not None] for name in SPLITTINGS}
    limit = sweep[0]["step size"] / sweep[0]["step / proved limit"]
    return curves(lines, x="step size", y="steps to a residual of 1e-6", marks={"proved limit": limit}, log=True)


def plot_of_training(training: Sequence[dict[str, Any]]) -> Any:
    lines = {
        name: [(row["step"], row["share converged"]) for row in training if row["run"] == name]
        for name in dict.fromkeys(row["run"] for row in training)
    }
    return curves(lines, x="training step", y="share of solves converged")


if __name__ == "__main__":
    sys.exit(main())
