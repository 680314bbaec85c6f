#!/usr/bin/env python3
"""Kill a training run at random points, many of them inside a checkpoint write, resume it, and compare its end."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from deq_lm.training import Recipe

EPILOG = """examples:
  python eval/reliability/kills.py
  python eval/reliability/kills.py --kills 30 --output kills.json

A run of --steps steps with a checkpoint every 5 is made once without interruption. Then it is begun again, killed
(SIGKILL), resumed, killed again, and so on to its end, in as many runs as the kills need; half of them wait for a
checkpoint write to begin and strike at a random moment of it. The end is compared by the SHA-256 of weights, optimizer and
random states.

exit codes: 0 every run ended with the weights of the uninterrupted one; 1 one did not; 2 a mistake in the call.
"""

FORK = multiprocessing.get_context("fork")
COMPARED = ("model.safetensors", "optimizer.pt", "rank_00000.safetensors")


@dataclass
class Counts:
    """What happened.

    Attributes:
        kills: processes killed.
        kills_in_a_write: of these, such that left a half-written checkpoint behind.
        runs: that were carried to their end.
        equal: of these, such that ended with the bits of the uninterrupted run.
        most_steps_lost: between a kill and the checkpoint it was resumed from, as far as metrics.jsonl knew.
    """

    kills: int = 0
    kills_in_a_write: int = 0
    runs: int = 0
    equal: int = 0
    most_steps_lost: int = 0


def run_kills(recipe: Recipe, *, num_kills: int, folder: Path, seed: int) -> Counts:
    """Do it.

    Args:
        recipe: of a run of a few seconds with several checkpoints; its output_dir is replaced.
        num_kills: 1 or more.
        folder: where the runs are made.
        seed: of the moments.

    Raises:
        RuntimeError: a process that was not killed failed.
    """
    draw, counts = random.Random(seed), Counts()  # noqa: S311
    whole = _in(recipe, folder / "whole")
    start = time.monotonic()
    _carry_to_the_end(whole)
    seconds = time.monotonic() - start
    expected = _digests(whole)
    while counts.kills < num_kills:
        killed = _in(recipe, folder / f"run_{counts.runs}")
        while counts.kills < num_kills:
            wanted_in_a_write = 2 * counts.kills_in_a_write <= counts.kills
            if not _kill_once(killed, counts, draw, seconds, in_a_write=wanted_in_a_write):
                break
        _carry_to_the_end(killed)
        counts.runs += 1
        counts.equal += _digests(killed) == expected
        print(f"run {counts.runs}: {counts}", flush=True)
        shutil.rmtree(killed.training.output_dir)
    return counts


def _in(recipe: Recipe, path: Path) -> Recipe:
    return replace(recipe, training=replace(recipe.training, output_dir=str(path)))


def _train(recipe: Recipe, log: Path) -> None:
    import torch
    from accelerate.state import AcceleratorState

    from deq_lm.training import train

    with open(log, "a") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.set_num_threads(1)
        train(recipe, resume=Path(recipe.training.output_dir).exists())


def _start(recipe: Recipe) -> ForkProcess:
    output = Path(recipe.training.output_dir)
    process = FORK.Process(target=_train, args=(recipe, output.with_suffix(".log")))
    process.start()
    return process


def _carry_to_the_end(recipe: Recipe) -> None:
    process = _start(recipe)
    process.join()
    _check(process, recipe)


def _check(process: ForkProcess, recipe: Recipe) -> None:
    if process.exitcode not in (0, -signal.SIGKILL):
        log = Path(recipe.training.output_dir).with_suffix(".log").read_text("utf-8", errors="replace")
        raise RuntimeError(f"training ended with exit code {process.exitcode}:\n{log[-4000:]}")


def _kill_once(recipe: Recipe, counts: Counts, draw: random.Random, seconds: float, *, in_a_write: bool) -> bool:
    """Train until a random moment; whether the run was still going then."""
    checkpoints = Path(recipe.training.output_dir) / "checkpoints"
    process = _start(recipe)
    if in_a_write:
        writes = draw.randint(1, 3)
        before: set[str] = set()
        while process.is_alive() and writes:
            aside = {path.name for path in checkpoints.glob(".*")} if checkpoints.is_dir() else set()
            writes -= len(aside - before)
            before |= aside
            time.sleep(2e-4)
        time.sleep(draw.uniform(0, 0.03))
    else:
        process.join(draw.uniform(0, seconds / 2))
    process.kill()
    process.join()
    _check(process, recipe)
    if process.exitcode == 0:
        return False
    counts.kills += 1
    counts.kills_in_a_write += any(checkpoints.glob(".*")) if checkpoints.is_dir() else False
    counts.most_steps_lost = max(counts.most_steps_lost, _last_step(recipe) - _newest(checkpoints))
    return True


def _last_step(recipe: Recipe) -> int:
    metrics = Path(recipe.training.output_dir) / "metrics.jsonl"
    lines = metrics.read_text("utf-8").split("\n")[:-1] if metrics.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def _newest(checkpoints: Path) -> int:
    return max((int(path.name[5:]) for path in checkpoints.glob("step_*")), default=0)


def _digests(recipe: Recipe) -> dict[str, str]:
    last = Path(recipe.training.output_dir) / "checkpoints" / f"step_{recipe.training.max_steps:08d}"
    files = json.loads((last / "manifest.json").read_text("utf-8"))["files"]
    return {name: files[name]["sha256"] for name in COMPARED}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="kills", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, help="default: 200")
    parser.add_argument("--steps", type=int, default=200, help="of a run; default: 200")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; default: 0")
    parser.add_argument("--output", type=Path, help="JSON file to write; default: none")
    arguments = parser.parse_args()

    from tiny import tiny_recipe

    from deq_lm.evaluation.records import Record, provenance, write_record
    from deq_lm.structure import to_mapping

    @dataclass(frozen=True, kw_only=True)
    class KillsResult(Record):
        kind: ClassVar[str] = "kills"
        steps: int
        checkpoint_every: int
        seed: int
        counts: dict[str, int]

    with tempfile.TemporaryDirectory() as folder:
        recipe = tiny_recipe(
            Path(folder), f"training.max_steps={arguments.steps}", "training.checkpoint_every=5", "training.log_every=1"
        )
        counts = run_kills(recipe, num_kills=arguments.kills, folder=Path(folder), seed=arguments.seed)
    result = KillsResult(
        **provenance(),
        steps=arguments.steps,
        checkpoint_every=recipe.training.checkpoint_every,
        seed=arguments.seed,
        counts=to_mapping(counts),
    )
    if arguments.output is not None:
        write_record(arguments.output, result)
    print(json.dumps(result.counts))
    return 0 if counts.equal == counts.runs else 1


if __name__ == "__main__":
    sys.exit(main())
