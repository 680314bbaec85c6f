"""What the benchmarks share: a clock for the device at hand, interleaved medians, options."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from deq_lm.errors import CheckpointError, ConfigError, DataError, in_one_line
from deq_lm.evaluation.records import check_output


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Time of one call: CUDA events on a GPU, processor time of all threads of this process on a CPU.

    Processor time leaves out what other processes take; with one thread it is the time on an idle machine.
    """
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.process_time()
    run()
    return time.process_time() - begin


def interleaved_medians(
    runs: Mapping[str, Callable[[], Any]], *, rounds: int, device: torch.device
) -> dict[str, float]:
    """Median seconds of each run over `rounds` rounds, every round calling each once, after one that is not counted."""
    for run in runs.values():
        run()
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            samples[name].append(seconds_of(run, device))
    return {name: statistics.median(times) for name, times in samples.items()}


PRECISIONS = ("float32", "tf32", "bf16")


@contextmanager
def computing_in(precision: str, device: torch.device) -> Iterator[None]:
    """Matrix products in float32, in TF32 (which only a GPU has), or under bfloat16 autocast."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def reachable(rtol: float, precision: str) -> float:
    """The tolerance to ask for: an evaluation in bfloat16 does not reach below 1e-2."""
    return max(rtol, 1e-2) if precision == "bf16" else rtol


def default_output(benchmark: str) -> Path:
    """Where a benchmark writes if it is not told: not over the committed results."""
    return Path("results") / f"{benchmark}.json"


def check_own_output(path: Path) -> None:
    """`check_output`; the folder of `default_output` may be missing, and is made when there is something to write.

    Raises:
        DataError: as there.
    """
    if path.parent != default_output("").parent or os.path.lexists(path.parent):
        check_output(path)


def benchmark_parser(doc: str | None, benchmark: str) -> argparse.ArgumentParser:
    """The options every benchmark has."""
    name, default = f"eval/benchmarks/{benchmark}.py", default_output(benchmark)
    epilog = f"""examples:
  python {name}
  python {name} --model runs/mine --output mine.json --rounds 9

exit codes: 0 done; 2 a mistake in the call, or no trained cell.
"""
    parser = argparse.ArgumentParser(
        prog=name, description=doc, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, default=Path("runs/benchmark_cell"), help="run whose cell is the trained one"
    )
    parser.add_argument("--output", type=Path, default=default, help=f"default: {default}")
    parser.add_argument("--rounds", type=count, default=5, help="interleaved rounds behind each median; default: 5")
    parser.add_argument("--threads", type=threads, default=1, help="CPU threads; default: 1")
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=PRECISIONS,
        default=list(PRECISIONS) if torch.cuda.is_available() else ["float32"],
        help="of the trained cell; default: float32, on a GPU all three. bf16 is solved to 1e-2 at most",
    )
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def count(text: str) -> int:
    """An option that is a number of 1 or more."""
    number = int(text)
    if not 1 <= number < 2**31:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 or more")
    return number


def tolerance(text: str) -> float:
    """An option that is a tolerance."""
    number = float(text)
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a number between 0 and 1")
    return number


def threads(text: str) -> int:
    """An option that is a number of threads."""
    number, available = int(text), os.cpu_count() or 1
    if not 1 <= number <= available:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 to {available}, the processors of this machine")
    return number


def device(text: str) -> torch.device:
    """An option that is a device of this machine, such as cpu, cuda or cuda:1."""
    try:
        found = torch.device(text)
        torch.empty(1, device=found).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"{text}: is no device of this machine ({reason})") from error
    return found


def run_benchmark(parser: argparse.ArgumentParser, measure: Callable[[argparse.Namespace], None]) -> int:
    """Measure what the command line asks for; the code to exit with."""
    arguments = parser.parse_args()
    try:
        check_own_output(arguments.output)
        torch.set_num_threads(arguments.threads)
        measure(arguments)
    except (CheckpointError, ConfigError, DataError, OSError) as error:
        print(f"{parser.prog}: {in_one_line(str(error))}", file=sys.stderr)
        return 2
    return 0
