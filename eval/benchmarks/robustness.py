#!/usr/bin/env python3
"""Solvers against problems: which sequences converge, at what cost, and where prefixes lose to whole sequences."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deq_lm.errors import CheckpointError, ConfigError, DataError, in_one_line
from deq_lm.evaluation.peak_memory import peak_live_bytes
from deq_lm.evaluation.records import check_output, environment
from deq_lm.evaluation.tables import markdown_table
from deq_lm.regularizers import spectral_radius
from deq_lm.solvers import Anderson, Broyden, FixedPointSolver, Outcome, Picard, StoppingRule, solve
from deq_lm.solvers.norms import unit_norm
from deq_lm.solvers.stopping import Progress

sys.path.insert(0, str(Path(__file__).resolve().parent))
import problem_suite as suites
from measure import count

EPILOG = """examples:
  python eval/benchmarks/robustness.py --output eval/results/robustness.json
  python eval/benchmarks/robustness.py --model runs/demo_cpu --solver Picard "Broyden prefix 16"

exit codes: 0 done; 2 a mistake in the call or a model.
"""

# A row of every table. Add a solver here; what it is compared with is REFERENCE.
SOLVERS: dict[str, FixedPointSolver] = {
    "Picard": Picard(),
    "Anderson prefix 16": Anderson(history_size=16),
    "Anderson prefix 8": Anderson(history_size=8),
    "Anderson sequence 16": Anderson(history_size=16, scope="sequence"),
    "Anderson sequence 8": Anderson(history_size=8, scope="sequence"),
    "Broyden prefix 16": Broyden(history_size=16),
    "Broyden prefix 8": Broyden(history_size=8),
    "Broyden sequence 16": Broyden(history_size=16, scope="sequence"),
    "Broyden sequence 8": Broyden(history_size=8, scope="sequence"),
}
REFERENCES = ("Broyden sequence 16", "Broyden sequence 8")
TOLERANCES = {torch.float64: (1e-3, 1e-6), torch.float32: (1e-3, 1e-4)}


@dataclass(frozen=True, kw_only=True)
class Record:
    """One solver on one problem to one tolerance.

    Attributes:
        problem: its name.
        family: of the problem.
        radius: spectral radius of the Jacobian at the best known solution, of each sequence; None where none was found.
        solver: its name in SOLVERS.
        rtol: relative tolerance.
        converged: of each sequence.
        evaluations: of each sequence.
        outcomes: how many sequences ended how.
        reached: of each sequence, whether its residual as a whole was ever within rtol. The prefix scope asks it of every
            position, which is more.
        residual: relative residual of each sequence at the end; None where it is not finite.
        thrown_away: positions that had converged and whose residual, evaluated anew, is above the tolerance.
        seconds: of the whole batch.
        peak_states: peak bytes of live tensors in a solve of at most 20 steps, in units of one state's bytes; f's own
            tensors count, and the solver's small matrices, which are large beside the states of the classical problems.
    """

    problem: str
    family: str
    radius: list[float | None]
    solver: str
    rtol: float
    converged: list[bool]
    evaluations: list[int]
    outcomes: dict[str, int]
    reached: list[bool]
    residual: list[float | None]
    thrown_away: int
    seconds: float
    peak_states: float


class WatchedRule(StoppingRule):
    """A stopping rule that remembers how it judged the last state."""

    def begin(self, norm: Tensor, image_norm: Tensor, num_evaluations: int, spacing: float) -> Progress:
        return self._seen(super().begin(norm, image_norm, num_evaluations, spacing))

    def advance(self, progress: Progress, norm: Tensor, image_norm: Tensor, num_evaluations: int) -> Progress:
        return self._seen(super().advance(progress, norm, image_norm, num_evaluations))

    def _seen(self, progress: Progress) -> Progress:
        object.__setattr__(self, "last", progress)
        return progress

    @property
    def converged(self) -> Tensor:
        """(B, U) bool."""
        return vars(self)["last"].outcome == Outcome.CONVERGED


def measure(problem: suites.Problem, name: str, rtol: float, max_steps: int, radius: list[float | None]) -> Record:
    """Run one solver on one problem. No patience: a solver that recovers late has recovered."""
    solver = SOLVERS[name]
    rule = WatchedRule(max_steps=max_steps, rtol=rtol, patience=None)
    start = time.perf_counter()
    solution = solve(problem.f, problem.z0, solver=solver, stopping=rule)
    seconds = time.perf_counter() - start

    image = problem.f(solution.z)
    residual_norm, image_norm = (unit_norm(each, solver.scope) for each in (image - solution.z, image))
    # Another evaluation of the same state may round differently.
    slack = 1e3 * torch.finfo(image.dtype).eps * image_norm
    lost = rule.converged & ~(residual_norm <= rtol * image_norm + slack)

    short = StoppingRule(max_steps=min(20, max_steps), rtol=rtol, patience=None)
    peak = peak_live_bytes(lambda: solve(problem.f, problem.z0, solver=solver, stopping=short))
    return Record(
        problem=problem.name,
        family=problem.family,
        radius=radius,
        solver=name,
        rtol=rtol,
        converged=solution.converged.tolist(),
        evaluations=solution.num_evaluations.tolist(),
        outcomes=dict(Counter(Outcome(code).name for code in solution.outcome.tolist())),
        reached=(solution.trace.relative_residual <= rtol).any(dim=0).tolist(),
        residual=_finite(solution.relative_residual),
        thrown_away=int(lost.sum()),
        seconds=round(seconds, 4),
        peak_states=round(peak / (problem.z0.numel() * problem.z0.element_size()), 1),
    )


def radius_at_solution(problem: suites.Problem) -> list[float | None]:
    """The spectral radius of each sequence that the strongest of the solvers here has solved."""
    solver = Broyden(history_size=60, scope="sequence")
    solution = solve(
        problem.f, problem.z0, solver=solver, stopping=StoppingRule(max_steps=150, rtol=1e-4, patience=None)
    )
    generator = torch.Generator().manual_seed(0)
    radius = spectral_radius(problem.f, solution.z, num_iterations=60, generator=generator)
    return _finite(torch.where(solution.converged, radius, float("nan")))


def run_suite(
    problems: Iterable[suites.Problem], names: Sequence[str], *, max_steps: int, report: bool = True
) -> list[Record]:
    """Every solver on every problem to every tolerance of the problem's precision."""
    records = []
    for problem in problems:
        radius = radius_at_solution(problem)
        for rtol in TOLERANCES[problem.z0.dtype]:
            records += [
                measure(problem, name, rtol, max_steps, radius)
                for name in names
                if problem.causal or SOLVERS[name].scope == "sequence"
            ]
        if report:
            print(f"\r{problem.name:60s}", end="", file=sys.stderr, flush=True)
    if report:
        print(file=sys.stderr)
    return records


# --- tables ------------------------------------------------------------------------------------------------------------


def family_table(records: Sequence[Record]) -> str:
    """Markdown: a row for each family, tolerance and solver."""
    rows = []
    for family, rtol in _distinct((record.family, record.rtol) for record in records):
        for name in _distinct(record.solver for record in records):
            chosen = [r for r in records if (r.family, r.rtol, r.solver) == (family, rtol, name)]
            if not chosen:
                continue
            converged = [flag for record in chosen for flag in record.converged]
            outcomes = sum((Counter(record.outcomes) for record in chosen), Counter())
            others = ", ".join(f"{n} {key.lower()}" for key, n in outcomes.items() if key != "CONVERGED")
            cells = [
                family,
                f"{rtol:g}",
                name,
                f"{sum(converged)}/{len(converged)}",
                *_counts(chosen),
                others or "-",
                f"{sum(record.seconds for record in chosen):.2f}",
                f"{max(record.peak_states for record in chosen):.0f}",
                str(sum(record.thrown_away for record in chosen)),
            ]
            rows.append(cells)
    header = ["family", "rtol", "solver", "converged", "evaluations, mean", "max", "others", "s", "peak states", "lost"]
    return _markdown(header, rows)


def solved(records: Sequence[Record]) -> list[dict[str, str]]:
    """A row for each solver: sequences solved and tried in each family, over all tolerances; positions thrown away."""
    rows = []
    for name in _distinct(record.solver for record in records):
        row = {"solver": name}
        for family in _distinct(record.family for record in records):
            flags = [flag for r in records if (r.family, r.solver) == (family, name) for flag in r.converged]
            row[family] = f"{sum(flags)}/{len(flags)}"
        row["thrown away"] = str(sum(record.thrown_away for record in records if record.solver == name))
        rows.append(row)
    return rows


def problem_table(records: Sequence[Record]) -> str:
    """Markdown: a row for each problem and tolerance, a column for each solver: converged, mean evaluations."""
    names = _distinct(record.solver for record in records)
    rows = []
    for problem, rtol in _distinct((record.problem, record.rtol) for record in records):
        chosen = {r.solver: r for r in records if (r.problem, r.rtol) == (problem, rtol)}
        first = next(iter(chosen.values()))
        known = [value for value in first.radius if value is not None]
        row = [problem, f"{rtol:g}", f"{max(known):.2f}" if known else "-"]
        for name in names:
            if name not in chosen:
                row.append("-")
                continue
            record = chosen[name]
            row.append(f"{sum(record.converged)}/{len(record.converged)} {_counts([record])[0]}")
        rows.append(row)
    return _markdown(["problem", "rtol", "radius", *names], rows)


def losses(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Every sequence that a reference solves and a prefix solver does not."""
    found = []
    for problem, rtol in _distinct((record.problem, record.rtol) for record in records):
        chosen = {r.solver: r for r in records if (r.problem, r.rtol) == (problem, rtol)}
        for name, record in chosen.items():
            if SOLVERS[name].scope != "prefix" or not isinstance(SOLVERS[name], Broyden):
                continue
            for index, flag in enumerate(record.converged):
                solved_by = [other for other in REFERENCES if other in chosen and chosen[other].converged[index]]
                if solved_by and not flag:
                    case = {
                        "problem": problem,
                        "rtol": rtol,
                        "sequence": index,
                        "radius": record.radius[index],
                        "solver": name,
                        "residual": record.residual[index],
                        "reached": record.reached[index],
                        "solved_by": {other: chosen[other].evaluations[index] for other in solved_by},
                    }
                    found.append(case)
    return found


def loss_table(found: Sequence[dict[str, Any]]) -> str:
    rows = []
    for case in found:
        residual, radius = case["residual"], case["radius"]
        rows.append(
            [
                case["problem"],
                str(case["sequence"]),
                f"{case['rtol']:g}",
                "-" if radius is None else f"{radius:.2f}",
                case["solver"],
                "not finite" if residual is None else f"{residual:.1e}",
                "yes" if case["reached"] else "no",
                ", ".join(f"{name}: {count}" for name, count in case["solved_by"].items()),
            ]
        )
    return _markdown(
        [
            "problem",
            "sequence",
            "rtol",
            "radius",
            "not solved by",
            "residual",
            "reached as a whole",
            "solved by, evaluations",
        ],
        rows,
    )


def as_json(result: dict[str, Any]) -> str:
    """Indented, but for the lists of records and losses, which have one entry a line."""
    lists = {key: result[key] for key in ("losses", "records")}
    head = json.dumps({key: value for key, value in result.items() if key not in lists}, indent=1, allow_nan=False)
    tails = []
    for key, entries in lists.items():
        lines = ",\n  ".join(json.dumps(entry, allow_nan=False) for entry in entries)
        tails.append(f' "{key}": [\n  {lines}\n ]')
    return head.removesuffix("\n}") + ",\n" + ",\n".join(tails) + "\n}\n"


def _counts(records: Sequence[Record]) -> tuple[str, str]:
    """Mean and largest evaluations of the converged sequences."""
    counts = [n for r in records for n, flag in zip(r.evaluations, r.converged, strict=True) if flag]
    return (f"{sum(counts) / len(counts):.1f}", str(max(counts))) if counts else ("-", "-")


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _finite(values: Tensor) -> list[float | None]:
    """As JSON has them, to three digits: None for what is not finite."""
    return [float(f"{value:.3g}") if abs(value) < float("inf") else None for value in values.tolist()]


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, nargs="*", default=[], help="run folders whose trained cells are problems too"
    )
    parser.add_argument("--solver", nargs="*", choices=list(SOLVERS), default=list(SOLVERS), help="default: all")
    parser.add_argument("--max-steps", type=count, default=100, help="default: 100")
    parser.add_argument("--seed", type=int, default=0, help="of the random problems")
    parser.add_argument("--quick", action="store_true", help="a few small problems, to try it out")
    parser.add_argument("--output", type=Path, help="JSON file to write, for example eval/results/robustness.json")
    arguments = parser.parse_args()
    if not 0 <= arguments.seed < 2**63:
        parser.error(f"--seed {arguments.seed}: expected 0 or more")

    size = {"batch": 2, "num_segments": 1} if arguments.quick else {}
    try:
        if arguments.output is not None:
            check_output(arguments.output)
        problems = suites.suite(seed=arguments.seed, quick=arguments.quick)
        for model in arguments.model:
            problems += suites.trained_problems(model, **size)
    except (CheckpointError, ConfigError, DataError, OSError) as error:
        print(f"{parser.prog}: {in_one_line(str(error))}", file=sys.stderr)
        return 2
    records = run_suite(problems, arguments.solver, max_steps=arguments.max_steps)
    found = losses(records)
    print(f"## Sequences solved\n\n{markdown_table(solved(records))}\n")
    print(f"## By family\n\n{family_table(records)}\n\n## By problem: converged, mean evaluations\n")
    print(f"{problem_table(records)}\n\n## Solved by Broyden over whole sequences and not over prefixes\n")
    print(loss_table(found) if found else "None.")
    thrown_away = sum(record.thrown_away for record in records)
    print(f"\nPositions that had converged and are above the tolerance in the returned state: {thrown_away}")
    if arguments.output is not None:
        result = {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": environment(),
            "seed": arguments.seed,
            "max_steps": arguments.max_steps,
            "solvers": {name: repr(SOLVERS[name]) for name in arguments.solver},
            "problems": {problem.name: problem.notes for problem in problems},
            "tables": {"sequences solved": solved(records)},
            "losses": found,
            "records": [asdict(record) for record in records],
        }
        arguments.output.write_text(as_json(result), "utf-8")
        print(f"\nwritten to {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
