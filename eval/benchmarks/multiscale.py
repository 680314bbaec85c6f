#!/usr/bin/env python3
"""A long-range copy: what a cell of two rates sees far back, beside the single-rate cell of as many parameters.

Streams of random symbols that repeat after DISTANCE tokens, in segments of SEGMENT tokens. Every token but the first
DISTANCE of a stream is scored, and is the one DISTANCE before it. Three language models, trained alike on the same streams:

multiscale: tokens see a window of 16, chunks of 16 tokens all of a memory of DISTANCE positions.
single rate: the Transformer-XL cell with as many parameters and a memory of SEGMENT positions. All of its parameters work
    at every token, so that an evaluation costs more.
single rate, long memory: the same with a memory of DISTANCE: what it costs to see as far at one rate.

Training begins with streams that repeat after DISTANCE / 16, and comes to DISTANCE in its second half: of one distance
among many nothing is learned in so few steps.

FLOPs are of matrix products, counted by torch, for a token in an evaluation of a segment whose memory is full.
nats per token: of streams that training has not seen. log(SYMBOLS) is chance; 0 is a perfect copy.
accuracy: share of these tokens that the model finds most likely.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import count, threads, tolerance
from torch import Tensor

from deq_lm import DEQLMConfig, DEQLMForCausalLM
from deq_lm.errors import ConfigError, in_one_line
from deq_lm.evaluation.records import check_output
from deq_lm.evaluation.tables import markdown_table, write_json
from deq_lm.suites.cost import count_flops

DISTANCE, SEGMENT, STREAMS, COPIES, SYMBOLS = 512, 64, 16, 3, 2
SHARED = {"d_model": 32, "num_heads": 4, "init_std": 0.15, "injection": "residual"}
CELLS: dict[str, dict[str, Any]] = {
    "multiscale": {
        **SHARED,
        "name": "multiscale",
        "d_inner": 64,
        "mem_len": DISTANCE,
        "attention_window": 16,
        "coarse": [{"ratio": 16, "d_model": 64, "num_heads": 4, "d_inner": 64}],
    },
    "single rate": {**SHARED, "name": "transformer_xl", "d_inner": 1522, "mem_len": SEGMENT},
    "single rate, long memory": {**SHARED, "name": "transformer_xl", "d_inner": 1522, "mem_len": DISTANCE},
}
SOLVE = {"max_steps": 12, "rtol": 1.0e-2}
EPILOG = """examples:
  python eval/benchmarks/multiscale.py
  python eval/benchmarks/multiscale.py --steps 200 --cells multiscale "single rate" --output mine.json

exit codes: 0 done; 2 a mistake in the call.
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="eval/benchmarks/multiscale.py",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = Path(__file__).resolve().parents[1] / "results" / "multiscale.json"
    parser.add_argument("--output", type=Path, default=default, help="default: results/multiscale.json")
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), default=list(CELLS), help="default: all")
    parser.add_argument("--steps", type=count, default=600, help="training steps; default: 600")
    parser.add_argument("--jobs", type=threads, default=1, help="cells at a time, one thread each; default: 1")
    parser.add_argument("--lr", type=tolerance, default=6e-3, help="learning rate; default: 6e-3")
    parser.add_argument("--seed", type=count, default=1, help="of weights and streams; default: 1")
    arguments = parser.parse_args()
    try:
        check_output(arguments.output)
    except (ConfigError, OSError) as error:
        print(f"{parser.prog}: {in_one_line(str(error))}", file=sys.stderr)
        return 2
    run_all(arguments)
    return 0


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
        print(f"{name}: step {record['step']}, {record['nats per token']:.4f} nats per token", flush=True)
    return {"cell": name, "parameters": num_parameters(model), "steps": steps, **score(model)}, records


def make(cell: dict[str, Any], seed: int) -> DEQLMForCausalLM:
    torch.manual_seed(seed)
    adjoint = {"name": "implicit", "stopping": SOLVE}
    return DEQLMForCausalLM(DEQLMConfig(vocab_size=SYMBOLS, cell=cell, stopping=SOLVE, adjoint=adjoint))


def num_parameters(model: DEQLMForCausalLM) -> int:
    """Of the cell."""
    return sum(parameter.numel() for parameter in model.model.layers.parameters())


def streams(generator: torch.Generator, period: int) -> Iterator[tuple[Tensor, Tensor]]:
    """New streams from their start: tokens and those that follow, -100 in the first DISTANCE, (STREAMS, SEGMENT) each."""
    length = (COPIES + 1) * DISTANCE
    stream = torch.randint(SYMBOLS, (STREAMS, period), generator=generator).repeat(1, length // period)
    targets = stream.roll(-1, dims=1)
    targets[:, : DISTANCE - 1] = -100
    return zip(stream.split(SEGMENT, dim=1), targets.split(SEGMENT, dim=1), strict=True)


def period_at(share: float) -> int:
    """What streams repeat after, of a share of the steps: DISTANCE / 16, ..., DISTANCE; the last for the second half."""
    return DISTANCE >> max(0, 4 - int(8 * share))


def train(model: DEQLMForCausalLM, steps: int, lr: float, seed: int) -> Iterator[dict[str, Any]]:
    """A record every 50 steps: means since the one before."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    model.train()
    losses, evaluations, step = [], [], 0
    while step < steps:
        memory = None
        for ids, targets in streams(generator, period_at(step / steps)):
            if (targets < 0).all():  # nothing to learn yet
                with torch.no_grad():
                    memory = model(ids, memory=memory, return_logits=False).memory
            elif step < steps:
                output = model(ids, targets=targets, memory=memory, return_logits=False)
                output.loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                memory, step = output.memory, step + 1
                losses.append(output.loss.detach())
                evaluations.append(output.solution.num_evaluations.float().mean())
                if step % 50 == 0 or step == steps:
                    yield {
                        "step": step,
                        "nats per token": float(torch.stack(losses).mean()),
                        "evaluations": float(torch.stack(evaluations).mean()),
                    }
                    losses, evaluations = [], []


@torch.no_grad()
def score(model: DEQLMForCausalLM) -> dict[str, Any]:
    """Of new streams that repeat after DISTANCE, the same for all models; with FLOPs and evaluations."""
    model.eval()
    nats, right, scored = 0.0, 0, 0
    ids, before, memory, evaluations = torch.empty(0), None, None, []
    for ids, targets in streams(torch.Generator().manual_seed(0), DISTANCE):
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
