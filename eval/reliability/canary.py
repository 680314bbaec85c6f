#!/usr/bin/env python3
"""Train on tokens that are drawn anew at every step: a model that beats chance on them sees what it predicts."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

if TYPE_CHECKING:
    from deq_lm import DEQLMForCausalLM

EPILOG = """examples:
  python eval/reliability/canary.py --only picard --solver-steps 6 --seeds 0
  python eval/reliability/canary.py --output canary.json

Every solver, with prefix sums and with sums over whole sequences, under every way to differentiate it, at 4, 5, 6 and 8
steps and with two seeds: hours on one core. Tokens are uniform, so that the loss of an honest model is ln V or more. A
solver whose steps mix later tokens into earlier ones is found where training goes through them; not to be found proves
nothing (the causality audit of eval/evaluate.py looks at the model itself). The file is written anew after each run; one
that is there already, of as many training steps, is gone on with: its runs are kept, and those that it lacks are made.

exit codes: 0 none is below chance by more than three standard errors; 1 one is; 2 a mistake in the call.
"""

VOCABULARY = 8
LENGTH = 12
FLOOR = math.log(VOCABULARY)
NUM_STEPS = 1500
BATCH_SIZE = 64
SCORED = 4096
"""Sequences of the evaluation, of LENGTH tokens each."""


@dataclass(frozen=True)
class Combination:
    """A solver and how it is differentiated, as the configuration of a model has them."""

    solver: dict[str, Any]
    adjoint: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.solver['name']} {self.solver['scope']}, {self.adjoint['name']}"


@dataclass(frozen=True, kw_only=True)
class Score:
    """Attributes:
    nats: mean loss of a token.
    standard_error: of that mean, from the losses of whole sequences.
    """

    nats: float
    standard_error: float

    @property
    def is_honest(self) -> bool:
        """Whether it is not below chance, by more than three standard errors (and what rounds)."""
        return self.nats >= FLOOR - 3 * self.standard_error - 1e-9


class Key(NamedTuple):
    """Which run it is, among those of as many training steps."""

    solver: str
    scope: str
    adjoint: str
    solver_steps: int
    seed: int

    def __str__(self) -> str:
        return f"{self.solver} {self.scope}, {self.adjoint}, {self.solver_steps} steps, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Outcome(Score):
    """The score of a run, and which it was.

    Attributes:
        solver, scope, adjoint, solver_steps, seed: its `Key`.
        commit: of the code that made it, as in `environment`; None in files from before it was kept.
        created: when it ended, or when the file that it was in was last written, ISO 8601, UTC; likewise.
    """

    solver: str
    scope: str
    adjoint: str
    solver_steps: int
    seed: int
    commit: str | None = None
    created: str | None = None

    @property
    def key(self) -> Key:
        return Key(*(getattr(self, name) for name in Key._fields))


def combinations() -> Iterator[Combination]:
    """All that a model may be configured with."""
    from deq_lm.modeling.builders import ADJOINTS, SOLVERS, build_adjoint, build_solver

    for name, kind in SOLVERS.items():
        # Steps without coefficients are the same under both scopes.
        for scope in ("prefix",) if kind.differentiable else ("prefix", "sequence"):
            solver = {"name": name, "scope": scope}
            for adjoint in ADJOINTS:
                try:
                    build_adjoint({"name": adjoint}, "adjoint").check(build_solver(solver, "solver"))
                except ValueError:
                    continue  # not offered
                yield Combination(solver, {"name": adjoint})


def make_model(combination: Combination, *, solver_steps: int, seed: int) -> DEQLMForCausalLM:
    """A small model whose solves take exactly so many steps."""
    import torch

    from deq_lm import DEQLMConfig, DEQLMForCausalLM
    from deq_lm.modeling.builders import SOLVERS

    kind = SOLVERS[combination.solver["name"]]
    cell: dict[str, Any] = {"d_model": 32, "num_heads": 4, "mem_len": 0, "init_std": 0.1}
    cell |= {"name": "monotone"} if kind.needs_proximal_form else {"name": "transformer_xl", "d_inner": 64}
    adjoint = dict(combination.adjoint)
    if adjoint["name"] == "implicit":
        adjoint["stopping"] = {"max_steps": 12, "rtol": 1e-2}
    torch.manual_seed(seed)
    config = DEQLMConfig(
        vocab_size=VOCABULARY,
        cell=cell,
        solver=combination.solver,
        stopping={"max_steps": solver_steps, "rtol": 0.0, "patience": None, "divergence_factor": None},
        adjoint=adjoint,
    )
    return DEQLMForCausalLM(config)


def train_and_score(model: DEQLMForCausalLM, *, num_steps: int, seed: int) -> Score:
    """Train on drawn tokens, and measure on others: the lower of two scores, with solves as evaluation runs them and as
    training records them. These end with their last iterate; a solve over whole sequences that nothing goes back through
    returns its best one, of which such a training knows nothing.

    Args:
        model: see `make_model`.
        num_steps: of training.
        seed: of the tokens.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)

    def draw(num_sequences: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.randint(VOCABULARY, (num_sequences, LENGTH + 1), generator=generator)
        return tokens[:, :-1], tokens[:, 1:]

    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(num_steps):
        inputs, targets = draw(BATCH_SIZE)
        loss = model(inputs, targets=targets, return_logits=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    inputs, targets = draw(SCORED)
    scores = []
    for recorded in (False, True):
        with torch.set_grad_enabled(recorded):
            logits = model(inputs).logits.detach().double()
        nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        of_sequences = nats.view(SCORED, LENGTH).mean(dim=1)
        scores.append(Score(nats=of_sequences.mean().item(), standard_error=of_sequences.std().item() / SCORED**0.5))
    return min(scores, key=lambda score: score.nats)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="canary", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="TEXT", default="", help="combinations with this text in their names")
    parser.add_argument(
        "--solver-steps", type=int, nargs="+", default=[4, 5, 6, 8], help="of a solve; default: 4 5 6 8"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="default: 0 1")
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help=f"of training; default: {NUM_STEPS:,}")
    parser.add_argument("--output", type=Path, help="JSON file to write, or to go on with; default: none")
    arguments = parser.parse_args()
    if min(arguments.solver_steps) < 1 or arguments.steps < 1:
        parser.error("--solver-steps and --steps: expected numbers of 1 or more")

    import torch

    from deq_lm.errors import DataError, in_one_line
    from deq_lm.evaluation.records import Record, check_output, environment, provenance, read_record, write_record

    @dataclass(frozen=True, kw_only=True)
    class CanaryResult(Record):
        """Its own commit and date are those of the last run."""

        kind: ClassVar[str] = "canary"
        floor_nats: float
        training_steps: int
        runs: list[Outcome]
        below_chance: list[str]

    chosen = [combination for combination in combinations() if arguments.only in str(combination)]
    if not chosen:
        parser.error(f"--only {arguments.only}: is in none of {'; '.join(map(str, combinations()))}")
    runs: list[Outcome] = []
    if arguments.output is not None:
        try:
            check_output(arguments.output)
            if arguments.output.exists():
                kept = read_record(arguments.output, CanaryResult)
                if kept.training_steps != arguments.steps:
                    raise DataError(
                        f"{arguments.output}: holds runs of {kept.training_steps} training steps, and these are of "
                        f"{arguments.steps}. Give another --output, or --steps {kept.training_steps}."
                    )
                if kept.floor_nats != FLOOR:
                    raise DataError(
                        f"{arguments.output}: holds runs whose chance was {kept.floor_nats} nats, and it is {FLOOR}. Give "
                        "another --output."
                    )
                runs = kept.runs
                print(f"{arguments.output}: its {len(runs)} runs are kept", flush=True)
        except (DataError, OSError) as error:
            parser.error(in_one_line(str(error)))
    torch.set_num_threads(1)
    commit = environment()["commit"]  # of the code as it was loaded
    done = {run.key for run in runs}
    for seed, solver_steps, combination in (
        (seed, solver_steps, combination)
        for seed in arguments.seeds
        for solver_steps in arguments.solver_steps
        for combination in chosen
    ):
        solver, adjoint = combination.solver, combination.adjoint
        key = Key(solver["name"], solver["scope"], adjoint["name"], solver_steps, seed)
        if key in done:
            continue
        model = make_model(combination, solver_steps=solver_steps, seed=seed)
        score = train_and_score(model, num_steps=arguments.steps, seed=seed)
        now = provenance()
        runs.append(Outcome(**vars(score), **key._asdict(), commit=commit, created=now["created"]))
        verdict = "honest" if score.is_honest else "BELOW CHANCE"
        print(f"{key}: {score.nats:.4f} +- {score.standard_error:.4f} (chance {FLOOR:.4f}) {verdict}", flush=True)
        if arguments.output is not None:
            result = CanaryResult(
                **now,
                floor_nats=FLOOR,
                training_steps=arguments.steps,
                runs=runs,
                below_chance=[str(run.key) for run in runs if not run.is_honest],
            )
            write_record(arguments.output, result)
    return 0 if all(run.is_honest for run in runs) else 1


if __name__ == "__main__":
    raise SystemExit(main())
