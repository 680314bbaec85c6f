"""What a run shows and records: a progress bar or plain lines, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import math
import resource
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib.util import find_spec
from typing import Any

import torch
from accelerate.tracking import TensorBoardTracker
from tqdm import tqdm

from deq_lm.evaluation.sample import printable
from deq_lm.solvers.stopping import Outcome
from deq_lm.training.faults import FAULTS, Account, nan_as_inf
from deq_lm.training.run_folder import RunFolder


@dataclass
class Interval:
    """What one process has seen since the last line of metrics.

    Attributes:
        num_steps: steps taken.
        num_targets: targets of the steps whose loss and gradient were finite, over all processes.
        nll_nats: their summed loss, over all processes.
        seconds: time spent in the steps.
        account: of faults, over all processes.
        solver_evaluations: evaluations of the cell, one number per solved sequence.
        solver_residuals: relative residual of the same solves.
        solver_outcomes: codes of `Outcome`; none in an unrolled model, which has no rule to meet.
        solver_fallbacks: 1 where the solve went on with the fallback, else 0; likewise.
        adjoint_evaluations: the same for the adjoint solves of the backward passes.
        adjoint_residuals: likewise.
        adjoint_outcomes: likewise.
        adjoint_fallbacks: likewise.
    """

    num_steps: int = 0
    num_targets: int = 0
    nll_nats: float = 0.0
    seconds: float = 0.0
    account: Account = field(default_factory=Account)
    solver_evaluations: list[float] = field(default_factory=list)
    solver_residuals: list[float] = field(default_factory=list)
    solver_outcomes: list[float] = field(default_factory=list)
    solver_fallbacks: list[float] = field(default_factory=list)
    adjoint_evaluations: list[float] = field(default_factory=list)
    adjoint_residuals: list[float] = field(default_factory=list)
    adjoint_outcomes: list[float] = field(default_factory=list)
    adjoint_fallbacks: list[float] = field(default_factory=list)

    @staticmethod
    def pooled(intervals: Sequence[Interval]) -> Interval:
        """That of a single process, of which all solves were; sums over all processes are each one's already."""
        solves = {
            name: [number for interval in intervals for number in getattr(interval, name)] for name in Interval.solves()
        }
        return replace(intervals[0], **solves)

    def without_solves(self) -> Interval:
        """The same sums, of a process that has had no solves."""
        return replace(self, **{name: [] for name in Interval.solves()})

    @staticmethod
    def solves() -> list[str]:
        """The names of what there is of every solve."""
        return [field.name for field in fields(Interval) if field.name.startswith(("solver_", "adjoint_"))]


def summarize(intervals: Sequence[Interval]) -> dict[str, float | int | None]:
    """One line of metrics from the intervals of all processes; None where there was nothing to measure.

    recipes/README.md says what each of them is.
    """
    first = intervals[0]  # the sums over all processes are the same on each
    loss = first.nll_nats / first.num_targets if first.num_targets else None

    def pooled(name: str) -> list[float]:
        values = [value for interval in intervals for value in getattr(interval, name)]
        return [nan_as_inf(value) for value in values]

    def mean(values: list[float]) -> float | None:
        return statistics.fmean(values) if values else None

    def median(values: list[float]) -> float | None:
        return finite(statistics.median(values)) if values else None

    def finite(value: float) -> float | None:
        return value if math.isfinite(value) else None

    def solves(name: str) -> dict[str, float | int | None]:
        evaluations, residuals = pooled(f"{name}_evaluations"), pooled(f"{name}_residuals")
        outcomes = pooled(f"{name}_outcomes")

        def share(*wanted: Outcome) -> float | None:
            return mean([float(outcome in wanted) for outcome in outcomes])

        return {
            f"{name}_evaluations": mean(evaluations),
            f"{name}_evaluations_max": int(max(evaluations)) if evaluations else None,
            f"{name}_residual": median(residuals),
            f"{name}_residual_max": finite(max(residuals)) if residuals else None,
            f"{name}_share_converged": share(Outcome.CONVERGED),
            f"{name}_share_stalled": share(Outcome.STALLED),
            f"{name}_share_diverged": share(Outcome.DIVERGED, Outcome.NON_FINITE),
            f"{name}_share_fallback": mean(pooled(f"{name}_fallbacks")),
        }

    return {
        "loss": loss,
        "token_perplexity": None if loss is None else math.exp(min(loss, 700.0)),  # exp(710) overflows
        "tokens_per_second": first.num_targets / first.seconds if first.seconds else None,
        **solves("solver"),
        **solves("adjoint"),
        **{name: first.account.num_steps.get(name, 0) for name in FAULTS},
        "retried": first.account.num_retried,
        "skipped": first.account.num_skipped,
    }


def memory_use(device: torch.device) -> dict[str, int | None]:
    """Bytes of memory that this process takes: all of it on the host, and what torch has given to tensors on a GPU.

    Returns:
        process_peak_bytes: the most it has had resident since it began, as the operating system counts.
        device_peak_bytes: the most allocated on the GPU since this was asked before; None on a CPU.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    device_peak = None
    if device.type == "cuda":
        device_peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    return {
        "process_peak_bytes": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "device_peak_bytes": device_peak,
    }


class Tracker:
    """Shows and records the metrics of a run; silent on all processes but the main one."""

    def __init__(self, run: RunFolder, *, step: int, max_steps: int, tensorboard: bool, enabled: bool) -> None:
        """
        Args:
            run: where to write; must be open.
            step: steps taken before.
            max_steps: steps in all.
            tensorboard: write TensorBoard files too, if it is installed.
            enabled: whether this is the main process.
        """
        self._enabled = enabled
        self._first_step, self._max_steps, self._start = step, max_steps, time.monotonic()
        self._board: TensorBoardTracker | None = None
        if not enabled:
            return
        self._metrics = open(run.metrics, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._bar = tqdm(total=max_steps, initial=step, unit="step", disable=not sys.stderr.isatty())
        if tensorboard and find_spec("tensorboard") is not None:
            self._board = TensorBoardTracker("tensorboard", run.path, purge_step=step + 1)
            self._board.start()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._enabled:
            return
        self._bar.close()
        self._metrics.close()
        if self._board is not None:
            self._board.finish()

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self._enabled:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def advance(self) -> None:
        """Count one step."""
        if self._enabled:
            self._bar.update()

    def log(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Record `values` of `step`: a line of metrics.jsonl, TensorBoard scalars `kind`/name, a line to read."""
        if not self._enabled:
            return
        self.record(step, kind, values)
        if self._board is not None:
            scalars = {f"{kind}/{name}": value for name, value in values.items() if value is not None}
            self._board.log(scalars, step=step)
        if kind == "train" and not self._bar.disable:
            self._bar.set_postfix_str(readable(values))
        elif kind == "train":
            self.say(f"step {step}/{self._max_steps}  {readable(values)}  eta {self._eta(step)}")
        else:
            self.say(f"step {step}/{self._max_steps}  {kind}: {readable(values)}")

    def show_text(self, step: int, name: str, text: str) -> None:
        """Record text that the model wrote: a line of metrics.jsonl, TensorBoard text, lines to read."""
        self.record(step, name, {"text": text})
        if self._board is not None:  # which reads it as Markdown, where what is indented is shown as it is
            self._board.log({name: "".join(f"    {line}\n" for line in printable(text).split("\n"))}, step=step)
        self.say(f"step {step}/{self._max_steps}  {name}: " + " | ".join(printable(text).split("\n")))

    def record(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl, and nothing else."""
        if self._enabled:
            self._metrics.write(json.dumps({"step": step, "kind": kind, **values}, allow_nan=False) + "\n")
            self._metrics.flush()

    def _eta(self, step: int) -> str:
        elapsed = time.monotonic() - self._start
        remaining = elapsed / (step - self._first_step) * (self._max_steps - step)
        return tqdm.format_interval(remaining)


_READABLE = {  # name: how it is shown
    "loss": "loss {:.3f} nats/token",
    "nats_per_token": "loss {:.3f} nats/token",
    "token_perplexity": "perplexity {:.1f}/token",
    "word_perplexity": "{:.1f}/word",
    "bits_per_byte": "{:.3f} bits/byte",
    "tokens_per_second": "{:,.0f} tokens/s",
    "solver_evaluations": "solver {:.1f} evaluations",
    "solver_residual": "residual {:.1e}",
    "spectral_radius": "spectral radius {:.2f}",
    "solver_share_converged": "{:.1%} converged",
    "solver_share_diverged": "{:.1%} diverged",
    "solver_share_fallback": "{:.1%} by fallback",
    "adjoint_evaluations": "adjoint {:.1f} evaluations",
    "adjoint_residual": "residual {:.1e}",
    "adjoint_share_converged": "{:.1%} converged",
    "adjoint_share_diverged": "{:.1%} diverged",
    "adjoint_share_fallback": "{:.1%} by fallback",
    "lr": "lr {:.2e}",
    "grad_norm": "gradient {:.2f}",
    "not_finite": "{} not finite",
    "retried": "{} computed again",
    "skipped": "{} without update",
}

_NORMAL = {  # name: the value that is not worth a word
    "solver_share_converged": 1,
    "solver_share_fallback": 0,
    "adjoint_share_converged": 1,
    "adjoint_share_diverged": 0,
    "adjoint_share_fallback": 0,
    "solver_share_diverged": 0,
    "not_finite": 0,
    "retried": 0,
    "skipped": 0,
}


def readable(values: Mapping[str, Any]) -> str:
    """Metrics as words with units, in one line; what was not measured, or is as it should be, is left out."""
    return "  ".join(
        text.format(values[name])
        for name, text in _READABLE.items()
        if values.get(name) is not None and values[name] != _NORMAL.get(name)
    )
