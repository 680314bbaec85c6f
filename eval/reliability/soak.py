#!/usr/bin/env python3
"""Train for a long time in two processes with numerical faults injected; watch memory, files and the account of faults."""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from deq_lm.training import Recipe

EPILOG = """examples:
  python eval/reliability/soak.py
  python eval/reliability/soak.py --minutes 2 --output soak.json

Both processes train a tiny model. In one step of 50, in one of the processes, a fault is made: a loss that is not finite,
a loss that jumps, or solves that are cut short. Every fault has to be found and dealt with as the recipe says.
What the process holds, tensors alive and open files are looked at all the time, and a line is fitted to each after the
first fifth.

exit codes: 0 all found, and memory is flat; 1 not so; 2 a mistake in the call.
"""

KINDS = ("not_finite", "loss_spike", "unconverged_solve")
EVERY = 50
"""Steps, of which one has a fault."""


class FaultInjector:
    """Makes a fault in some steps, the same on each process for the same seed; only one process has it.

    Attributes:
        steps: of each kind, the steps that were given one, over all processes.
    """

    def __init__(self, model_class: type, *, seed: int, rank: int, num_ranks: int) -> None:
        self.steps: dict[str, list[int]] = {kind: [] for kind in KINDS}
        self._draw, self._rank, self._num_ranks = random.Random(seed), rank, num_ranks  # noqa: S311
        self._forward = model_class.forward
        self._now: str | None = None
        injector = self

        def forward(model: Any, *arguments: Any, **options: Any) -> Any:
            if not model.training or injector._now is None:
                return injector._forward(model, *arguments, **options)
            if injector._now == "unconverged_solve":
                from deq_lm.solvers import StoppingRule

                options["stopping"] = StoppingRule.fixed(0)
            output = injector._forward(model, *arguments, **options)
            if injector._now == "not_finite":
                output.nll_nats = output.nll_nats * float("nan")
            elif injector._now == "loss_spike":
                output.nll_nats = output.nll_nats + 20.0 * options["targets"].numel()
            return output

        model_class.forward = forward

    def before(self, step: int) -> None:
        """Decide what a step has."""
        is_hit = self._draw.randrange(EVERY) == 0
        kind, rank = self._draw.choice(KINDS), self._draw.randrange(self._num_ranks)
        self._now = kind if is_hit and rank == self._rank else None
        if is_hit:
            self.steps[kind].append(step)


@dataclass(frozen=True)
class Watched:
    """What a process held at a moment."""

    seconds: float
    step: int
    resident_bytes: int
    tensor_bytes: int
    open_files: int


def train_and_watch(recipe: Recipe, minutes: float, folder: Path) -> None:
    """One process: train for so long, and leave what was seen in `folder`."""
    import torch
    from accelerate.state import AcceleratorState

    from deq_lm.modeling import DEQLMForCausalLM
    from deq_lm.training import loop

    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(1)
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    injector = FaultInjector(DEQLMForCausalLM, seed=recipe.seed, rank=rank, num_ranks=num_ranks)
    watched: list[Watched] = []
    step, start = loop.train_step, time.monotonic()

    def watched_step(*arguments: Any, **options: Any) -> Any:
        number = arguments[2].progress.step + 1
        injector.before(number)
        result = step(*arguments, **options)
        if number % 200 == 0:
            watched.append(_look(number, time.monotonic() - start))
        return result

    loop.train_step = watched_step
    if rank == 0:  # it tells the other one with the numbers of a step
        threading.Timer(60 * minutes, os.kill, (os.getpid(), signal.SIGTERM)).start()
    log = open(folder / f"{rank}.log", "w")  # noqa: SIM115 - of the whole process
    os.dup2(log.fileno(), sys.stdout.fileno())
    os.dup2(log.fileno(), sys.stderr.fileno())
    ended = loop.train(recipe)
    facts = {"ended": ended, "injected": injector.steps, "watched": [vars(moment) for moment in watched]}
    (folder / f"{rank}.json").write_text(json.dumps(facts), encoding="utf-8")


def _look(step: int, seconds: float) -> Watched:
    import torch

    gc.collect()
    tensors = {
        id(thing): thing.nbytes for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)
    }
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Watched(
        seconds=seconds,
        step=step,
        resident_bytes=pages * os.sysconf("SC_PAGE_SIZE"),
        tensor_bytes=sum(tensors.values()),
        open_files=len(os.listdir("/proc/self/fd")),
    )


def growth(moments: Sequence[Watched], name: str) -> float:
    """By a straight line through all but the first fifth: what is added over their time, as a share of the mean."""
    import numpy as np

    kept = moments[len(moments) // 5 :]
    steps, values = ([getattr(moment, field) for moment in kept] for field in ("step", name))
    slope, _ = np.polyfit(steps, values, 1)
    return float(slope * (steps[-1] - steps[0]) / np.mean(values))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="soak", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30, help="default: 30")
    parser.add_argument("--output", type=Path, help="JSON file to write; default: none")
    arguments = parser.parse_args()

    from accelerate import debug_launcher
    from tiny import tiny_recipe

    from deq_lm.data.encoding import prepare
    from deq_lm.evaluation.records import Record, provenance, write_record

    @dataclass(frozen=True, kw_only=True)
    class SoakResult(Record):
        kind: ClassVar[str] = "soak"
        minutes: float
        processes: int
        steps: int
        injected: dict[str, int]
        missed: dict[str, int]
        not_injected: dict[str, int]
        skipped: int
        retried: int
        growth_of_resident_bytes: list[float]
        growth_of_tensor_bytes: list[float]
        growth_of_open_files: list[float]
        resident_bytes: list[int]
        tensor_bytes: list[int]
        open_files: list[int]

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = tiny_recipe(
            folder / "run",
            "training.max_steps=1000000000",
            "training.checkpoint_every=2000",
            "training.log_every=100",
            "training.phases=[]",
            "training.optimizer.lr=1.0e-3",
            "training.faults={not_finite: skip, loss_spike: {policy: skip, limit: 5.0}, unconverged_solve: {policy: retry, "
            "limit: 0.3}, unconverged_adjoint: {policy: ignore, limit: 0.1}}",
        )
        prepare(recipe.data)
        debug_launcher(train_and_watch, args=(recipe, arguments.minutes, folder), num_processes=2)
        facts = [json.loads((folder / f"{rank}.json").read_text("utf-8")) for rank in (0, 1)]
        lines = (folder / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "fault"]
    found = {kind: {record["step"] for record in records if kind in record["faults"]} for kind in KINDS}
    injected = {kind: set(steps) for kind, steps in facts[0]["injected"].items()}
    metrics = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    watched = [[Watched(**moment) for moment in fact["watched"]] for fact in facts]
    result = SoakResult(
        **provenance(),
        minutes=arguments.minutes,
        processes=2,
        steps=watched[0][-1].step,
        injected={kind: len(steps) for kind, steps in injected.items()},
        missed={kind: len(injected[kind] - found[kind]) for kind in KINDS},
        not_injected={kind: len(found[kind] - injected[kind]) for kind in KINDS},
        skipped=sum(record["policy"] == "skip" for record in records),
        retried=sum(record["policy"] == "retry" for record in records),
        growth_of_resident_bytes=[growth(moments, "resident_bytes") for moments in watched],
        growth_of_tensor_bytes=[growth(moments, "tensor_bytes") for moments in watched],
        growth_of_open_files=[growth(moments, "open_files") for moments in watched],
        resident_bytes=[moments[-1].resident_bytes for moments in watched],
        tensor_bytes=[moments[-1].tensor_bytes for moments in watched],
        open_files=[moments[-1].open_files for moments in watched],
    )
    if arguments.output is not None:
        write_record(arguments.output, result)
    print(json.dumps({name: value for name, value in vars(result).items() if name != "environment"}, indent=1))
    print("last losses:", [line["loss"] for line in metrics[-3:]])
    grown = [*result.growth_of_resident_bytes, *result.growth_of_tensor_bytes, *result.growth_of_open_files]
    return 0 if not any(result.missed.values()) and max(grown) < 0.01 else 1


if __name__ == "__main__":
    sys.exit(main())
