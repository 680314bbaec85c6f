#!/usr/bin/env python3
"""Would blocks of positions, or a scan, be faster than the resolvent's recurrence? One application, and a whole solve.

The resolvent of the monotone cell, (I + step (I - W))^-1, is applied once a step of Peaceman-Rachford splitting. All forms
are built once a solve from the same factored block, and give the same up to rounding:

recurrence: the project's own, one position after the other.
in place: the same, written into its result. Autograd cannot record it, as an unrolled solve asks for.
blocks of P: the dense inverse of P positions is applied to all blocks at once, and each block's last K states are carried
    into the next: L / P products one after the other, P + K instead of 1 + K blocks of W a position.
scan by P: the recurrence within all blocks at once, P products; what the blocks end with, L / P products; and then added
    to every position.

ms: processor time on a CPU, medians of interleaved rounds. gain: the recurrence's time over that of the form.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import count, default_output, device, interleaved_medians, run_benchmark, threads
from torch import Tensor

from deq_lm.cells import MonotoneCell, MonotoneConfig
from deq_lm.cells.causal_operator import CausalOperator, CausalResolvent
from deq_lm.cells.proximal_map import ProximalMap
from deq_lm.evaluation.tables import markdown_table, write_json
from deq_lm.solvers import PeacemanRachford, StoppingRule, solve

Resolvent = Callable[[Tensor], Tensor]

APPLIED = [
    (8, length, width, taps) for length in (64, 256, 1024) for width in (32, 64, 128, 256) for taps in (0, 1, 2, 4)
]
"""(B, L, D, K) of one application."""

SOLVED = {
    "demo_cpu_monotone": (16, 64, 128, 4),
    "wiki21m_monotone, 8 of 64 sequences": (8, 256, 512, 4),
    "narrow": (8, 64, 32, 4),
    "narrow, long": (8, 1024, 32, 4),
}
"""(B, L, D, K) of a whole solve, to 1e-2 as in training."""

EPILOG = """examples:
  python eval/benchmarks/resolvent.py
  python eval/benchmarks/resolvent.py --device cuda --output mine.json

exit codes: 0 done; 2 a mistake in the call.
"""


@dataclass(frozen=True)
class InPlace:
    """The recurrence, each state added where its own part already is."""

    by_steps: CausalResolvent

    def __call__(self, r: Tensor) -> Tensor:
        inverse, feedback = self.by_steps.inverse, self.by_steps.feedback
        batch, length, width = r.shape
        taps = feedback.shape[1] // width
        oldest_first = torch.cat(feedback.split(width, dim=1)[::-1], dim=1).T if taps else feedback.T
        z = F.pad(F.linear(r, inverse), (0, 0, taps, 0)).flatten(1)
        for t in range(length if taps else 0):
            own = slice((taps + t) * width, (taps + t + 1) * width)
            z[:, own].addmm_(z[:, t * width : (t + taps) * width], oldest_first)
        return z.view(batch, taps + length, width)[:, taps:]


class Blocked:
    """P positions by one dense inverse, from the states that the block before ends with."""

    def __init__(self, by_steps: CausalResolvent, num_positions: int) -> None:
        inverse, self.feedback = by_steps.inverse, by_steps.feedback
        self.num_positions = num_positions
        unit = F.pad(inverse.T[:, None], (0, 0, 0, num_positions - 1))  # what one input makes of a block, (D, P, D)
        response = self._recurrence(unit)
        shifted = [F.pad(response, (0, 0, i, 0))[:, :num_positions] for i in range(num_positions)]
        self.own = torch.stack(shifted).flatten(0, 1).flatten(1)  # (P D, P D)
        width, columns = self.feedback.shape
        zeros = self.feedback.new_zeros(columns, num_positions, width)
        self.carried = self._recurrence(zeros, torch.eye(columns).to(zeros)).flatten(1)  # of K states, (K D, P D)

    def __call__(self, r: Tensor) -> Tensor:
        blocks = self._blocks(r)
        z = (blocks.flatten(2) @ self.own).view_as(blocks)
        for i in range(1, z.shape[1] if self.carried.numel() else 0):
            z[:, i] += self._ends(z[:, i - 1]).matmul(self.carried).view_as(z[:, i])
        return z.flatten(1, 2)[:, : r.shape[1]]

    def _blocks(self, r: Tensor) -> Tensor:
        """(B, L / P, P, D)."""
        return F.pad(r, (0, 0, 0, -r.shape[1] % self.num_positions)).unflatten(1, (-1, self.num_positions))

    def _ends(self, z: Tensor) -> Tensor:
        """z_P, ..., z_{P - K + 1} of (..., P, D), newest first: (..., K D)."""
        width, columns = self.feedback.shape
        return z[..., self.num_positions - columns // width :, :].flip(-2).flatten(-2)

    def _recurrence(self, local: Tensor, past: Tensor | None = None) -> Tensor:
        """z_t = local_t + sum_k F_k z_{t-k}, from the states before, (B, K D), newest first."""
        past = local.new_zeros(len(local), self.feedback.shape[1]) if past is None else past
        states = []
        for own in local.unbind(1):
            states.append(torch.addmm(own, past, self.feedback.T))
            past = torch.cat([states[-1], past], dim=1)[:, : self.feedback.shape[1]]
        return torch.stack(states, dim=1)


class Scanned(Blocked):
    """All blocks from zero at once, then what each ends with, from left to right, then what that adds."""

    def __init__(self, by_steps: CausalResolvent, num_positions: int) -> None:
        super().__init__(by_steps, num_positions)
        self.within = InPlace(by_steps)
        width = len(self.feedback)
        self.onward = self._ends(self.carried.unflatten(1, (num_positions, width)))  # (K D, K D)

    def __call__(self, r: Tensor) -> Tensor:
        blocks = self._blocks(r)
        z = self.within(blocks.flatten(0, 1)).reshape(blocks.shape)
        if self.carried.numel():
            ends = self._ends(z)
            for i in range(1, ends.shape[1] - 1):
                ends[:, i].addmm_(ends[:, i - 1], self.onward)
            z[:, 1:] += (ends[:, :-1] @ self.carried).view_as(z[:, 1:])
        return z.flatten(1, 2)[:, : r.shape[1]]


FORMS: dict[str, Callable[[CausalResolvent], Resolvent]] = {
    "recurrence": lambda by_steps: by_steps,
    "in place": InPlace,
    "blocks of 4": partial(Blocked, num_positions=4),
    "blocks of 8": partial(Blocked, num_positions=8),
    "scan by 8": partial(Scanned, num_positions=8),
    "scan by 16": partial(Scanned, num_positions=16),
}


@dataclass(frozen=True)
class OtherwiseSolved(ProximalMap):
    """The same map, whose resolvent has another form."""

    form: Callable[[CausalResolvent], Resolvent]

    def resolvent(self, step: Tensor | float) -> Resolvent:
        inverse = self.form(self.operator.resolvent(step))
        return lambda v: inverse(v + step * self.offset)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="eval/benchmarks/resolvent.py",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = default_output("resolvent")
    parser.add_argument("--output", type=Path, default=default, help="default: results/resolvent.json")
    parser.add_argument("--rounds", type=count, default=5, help="interleaved rounds behind each median; default: 5")
    parser.add_argument("--threads", type=threads, default=1, help="CPU threads; default: 1")
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    return run_benchmark(parser, run_all)


@torch.no_grad()
def run_all(arguments: argparse.Namespace) -> None:
    """Time all forms, print and write the tables."""
    medians = partial(interleaved_medians, rounds=arguments.rounds, device=arguments.device)
    tables = {
        "whole solve": list(whole_solves(medians, arguments.device)),
        "one application": list(applications(medians, arguments.device)),
    }
    for title, rows in tables.items():
        print(f"\n{title}\n\n{markdown_table(rows)}")
    write_json(arguments.output, {"tables": tables})


def whole_solves(medians: Callable[..., dict[str, float]], on: torch.device) -> Iterator[dict[str, Any]]:
    """A row for every form and size in SOLVED, of a cell with random weights."""
    rule = StoppingRule(max_steps=40, rtol=1e-2, patience=None)
    for name, (batch, length, width, num_taps) in SOLVED.items():
        torch.manual_seed(0)
        cell = MonotoneCell(MonotoneConfig(d_model=width, num_taps=num_taps, init_std=0.5 * width**-0.5)).to(on)
        form = cell.bind(torch.randn(batch, length, width, device=on)).proximal_form
        forms = {kind: OtherwiseSolved(**vars(form), form=make) for kind, make in FORMS.items()}
        solves = {
            kind: partial(solve, form, torch.zeros_like(form.offset), solver=PeacemanRachford(), stopping=rule)
            for kind, form in forms.items()
        }
        steps = int(solves["recurrence"]().num_steps.max())
        seconds = medians(solves)
        for kind in FORMS:
            gain = seconds["recurrence"] / seconds[kind]
            size = {"size": name, "B": batch, "L": length, "D": width, "K": num_taps, "steps": steps}
            yield {**size, "form": kind, "ms": 1e3 * seconds[kind], "gain": gain}


def applications(medians: Callable[..., dict[str, float]], on: torch.device) -> Iterator[dict[str, Any]]:
    """A row for every dtype and size in APPLIED: the recurrence's time, and the gain of every other form."""
    for dtype in (torch.float32, torch.float64):
        for batch, length, width, num_taps in APPLIED:
            torch.manual_seed(0)
            blocks = torch.randn(width, (num_taps + 1) * width, dtype=dtype, device=on) / (
                4 * (num_taps + 1) * width**0.5
            )
            r = torch.randn(batch, length, width, dtype=dtype, device=on)
            by_steps = CausalOperator(blocks).resolvent(0.5)
            made = {kind: make(by_steps) for kind, make in FORMS.items()}
            seconds = medians({kind: partial(form, r) for kind, form in made.items()})
            size = {"dtype": str(dtype).removeprefix("torch."), "B": batch, "L": length, "D": width, "K": num_taps}
            gains = {kind: seconds["recurrence"] / seconds[kind] for kind in FORMS if kind != "recurrence"}
            yield {**size, "recurrence, ms": 1e3 * seconds["recurrence"], **gains}


if __name__ == "__main__":
    sys.exit(main())
