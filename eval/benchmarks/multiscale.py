#!/usr/bin/env python3
"""A long-range copy: what a cell of two rates sees far back, beside the single-rate cell of as many parameters.

Streams of random symbols that repeat after DISTANCE tokens, in segments of SEGMENT tokens. Every token but the first
DISTANCE of a stream is scored, and is the one DISTANCE before it. Three language models, trained alike, all see as far:

multiscale: tokens see a window of 16, chunks of 16 tokens all of a memory of DISTANCE positions.
single rate, equal FLOPs: the Transformer-XL cell with a memory of DISTANCE. Attention to so many tokens takes most of its
    FLOPs, so that it has half the width and few parameters.
single rate, equal parameters: the same with as many parameters, which all work at every token.

Training begins with streams that repeat after DISTANCE / 16, of which memory holds 16 copies: of one copy among so many
positions, right from the start, none of the models learns anything. When the mean loss over a batch of streams falls below
half of chance, half of the next ones repeat after twice as much, and the others after all that was learned before; up to
DISTANCE. All these numbers divide DISTANCE, so that the token so far back is the one that is asked for in all streams.

distance learned: the longest for which the loss fell so far; - if none.
FLOPs are of matrix products, counted by torch, for a token in an evaluation of a segment whose memory is full.
nats per token: of streams that training has not seen. log(SYMBOLS) is chance; 0 is a perfect copy.
accuracy: share of these tokens that the model finds most likely.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from measure import count, default_output, run_benchmark, threads, tolerance
from torch import Tensor

from deq_lm import DEQLMConfig, DEQLMForCausalLM
from deq_lm.evaluation.tables import markdown_table, write_json
from deq_lm.suites.cost import count_flops

DISTANCE, SEGMENT, STREAMS, COPIES, SYMBOLS = 512, 64, 16, 3, 2
SHARED = {"num_heads": 4, "init_std": 0.15, "injection": "residual", "mem_len": DISTANCE}
CELLS: dict[str, dict[str, Any]] = {
    "multiscale": {
        **SHARED,
        "name": "multiscale",
        "d_model": 32,
        "d_inner": 64,
        "attention_window": 16,
        "coarse": [{"ratio": 16, "d_model": 64, "num_heads": 4, "d_inner": 64}],
    },
    "single rate, equal FLOPs": {**SHARED, "name": "transformer_xl", "d_model": 16, "d_inner": 32},
    "single rate, equal parameters": {**SHARED, "name": "transformer_xl", "d_model": 32, "d_inner": 1522},
}
SOLVE = {"max_steps": 24, "rtol": 1.0e-2}
JACOBIAN_WEIGHT = 0.01
"""In every second step, so that solves stay short."""
LEARNED = 0.5 * math.log(SYMBOLS)
"""Nats per token: half of chance."""

EPILOG = """examples:
  python eval/benchmarks/multiscale.py
  python eval/benchmarks/multiscale.py --steps 200 --cells multiscale --output mine.json

exit codes: 0 done; 2 a mistake in the call.
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="eval/benchmarks/multiscale.py",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = default_output("multiscale")
    parser.add_argument("--output", type=Path, default=default, help="default: results/multiscale.json")
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), default=list(CELLS), help="default: all")
    parser.add_argument("--steps", type=count, default=600, help="training steps; default: 600")
    parser.add_argument("--jobs", type=threads, default=1, help="cells at a time, one thread each; default: 1")
    parser.add_argument("--lr", type=tolerance, default=4e-3, help="learning rate; default: 4e-3")
    parser.add_argument("--seed", type=count, default=1, help="of weights and streams; default: 1")
    parser.set_defaults(threads=1)
    return run_benchmark(parser, run_all)


def run_all(arguments: argparse.Namespace) -> None:
    """Train and score each, print and write the table and the losses on the way."""
    measured = partial(measure, steps=arguments.steps, lr=arguments.lr, seed=arguments.seed)
    rows, training = [], []
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for row, records in pool.map(measured, arguments.cells):
            rows.append(row)
            training += records
            print(f"\n{markdown_table(rows)}\n", flush=True)
            write_json(arguments.output, {"tables": {"copy": rows}, "training": training})


def measure(name: str, steps: int, lr: float, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A row of the table, and the losses on the way."""
    torch.set_num_threads(1)
    model, records = make(CELLS[name], seed), []
    for record in train(model, steps, lr, seed):
        records.append({"cell": name, **record})
        print(
            f"{name}: step {record['step']}, distance {record['distance']}, {record['nats per token']:.4f} nats per token",
            flush=True,
        )
    learned = max((record["learned"] for record in records), default=0) or None
    facts = {"cell": name, "parameters": num_parameters(model), "steps": steps, "distance learned": learned}
    return {**facts, **score(model)}, records


def make(cell: dict[str, Any], seed: int) -> DEQLMForCausalLM:
    torch.manual_seed(seed)
    adjoint = {"name": "implicit", "stopping": SOLVE}
    return DEQLMForCausalLM(DEQLMConfig(vocab_size=SYMBOLS, cell=cell, stopping=SOLVE, adjoint=adjoint))


def num_parameters(model: DEQLMForCausalLM) -> int:
    """Of the cell."""
    return sum(parameter.numel() for parameter in model.model.layers.parameters())


def streams(generator: torch.Generator, periods: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """New streams from their start: tokens and those that follow, -100 in the first DISTANCE, (STREAMS, SEGMENT) each.

    The i-th repeats after periods[i] tokens, and so on from the beginning of `periods`.
    """
    length = (COPIES + 1) * DISTANCE
    drawn = torch.randint(SYMBOLS, (STREAMS, DISTANCE), generator=generator)
    repeated = [row[:period].repeat(length // period) for row, period in zip(drawn, cycle(periods), strict=False)]
    stream = torch.stack(repeated)
    targets = stream.roll(-1, dims=1)
    targets[:, : DISTANCE - 1] = -100
    return zip(stream.split(SEGMENT, dim=1), targets.split(SEGMENT, dim=1), strict=True)


def periods_for(distance: int) -> list[int]:
    """What streams repeat after that are to teach `distance`: every second one after that, the others after less."""
    shorter = [DISTANCE // 16]
    while 2 * shorter[-1] < distance:
        shorter.append(2 * shorter[-1])
    return [period for less in shorter for period in (distance, less)]


def train(model: DEQLMForCausalLM, steps: int, lr: float, seed: int) -> Iterator[dict[str, Any]]:
    """A record after each batch of streams: the distance it is to teach, what was learned, and means of its steps."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.02, total_iters=50)
    model.train()
    distance, learned, step = DISTANCE // 16, 0, 0
    while step < steps:
        memory, losses, evaluations = None, [], []
        for ids, targets in streams(generator, periods_for(distance)):
            if (targets < 0).all():  # nothing to learn yet
                with torch.no_grad():
                    memory = model(ids, memory=memory, return_logits=False).memory
            elif step < steps:
                regularized = step % 2 == 0
                output = model(ids, targets=targets, memory=memory, return_logits=False, estimate_jacobian=regularized)
                (output.loss + JACOBIAN_WEIGHT * output.jacobian.mean() if regularized else output.loss).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                memory, step = output.memory, step + 1
                losses.append(output.loss.detach())
                evaluations.append(output.solution.num_evaluations.float().mean())
        loss = float(torch.stack(losses).mean())
        learned = distance if loss < LEARNED else learned
        yield {
            "step": step,
            "distance": distance,
            "learned": learned,
            "nats per token": loss,
            "evaluations": float(torch.stack(evaluations).mean()),
        }
        distance = min(DISTANCE, 2 * distance) if loss < LEARNED else distance


@torch.no_grad()
def score(model: DEQLMForCausalLM) -> dict[str, Any]:
    """Of new streams that repeat after DISTANCE, the same for all models; with FLOPs and evaluations."""
    model.eval()
    nats, right, scored = 0.0, 0, 0
    ids, before, memory, evaluations = torch.empty(0), None, None, []
    for ids, targets in streams(torch.Generator().manual_seed(0), [DISTANCE]):
        output = model(ids, targets=targets, memory=memory)
        nats += float(output.nll_nats)
        right += int((output.logits.argmax(dim=-1) == targets).sum())
        scored += int(output.num_targets)
        evaluations.append(output.solution.num_evaluations.float().mean())
        before, memory = memory, output.memory
    flops = count_flops(lambda: model.model(ids, memory=before, max_evaluations=1))
    return {
        "FLOPs": round(flops / ids.numel()),
        "evaluations": float(torch.stack(evaluations).mean()),
        "nats per token": nats / scored,
        "accuracy": right / scored,
    }


if __name__ == "__main__":
    sys.exit(main())
