"""Numerical faults of a training step: what counts as one, and what becomes of the step.

| fault | what is measured, over all processes and segments of the step |
|---|---|
| `not_finite` | whether the loss or the gradient is not a finite number |
| `loss_spike` | nats per token of the step, less their running mean |
| `unconverged_solve` | the largest relative residual of a forward solve |
| `unconverged_adjoint` | the largest relative residual of an adjoint solve; the gradient is then not that of the loss |

| policy | what becomes of the step |
|---|---|
| `ignore` | the weights are updated; the fault is only counted |
| `warn` | the weights are updated; the fault is counted, recorded with its place in the text, and reported |
| `retry` | it is computed once more, its solves with `RETRY_BUDGET` times the steps; if the fault stays, as `skip` |
| `skip` | no update; otherwise as `warn` |
| `raise` | the run ends before the update, and leaves its checkpoints as they were |

Every process comes to the same decision, from numbers that are the same on all. Of several faults the sternest policy
counts. A step that is not finite has no other fault.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from deq_lm.errors import SolveError

Policy = Literal["ignore", "warn", "retry", "skip", "raise"]

RETRY_BUDGET = 2
"""Times the steps of a solve when a step is computed once more."""

MAX_SKIPPED_IN_A_ROW = 10
"""Steps in a row without an update before a run gives up."""

_STERNNESS: tuple[Policy, ...] = ("ignore", "warn", "skip", "retry", "raise")


@dataclass(frozen=True)
class FaultConfig:
    """One kind of fault.

    Attributes:
        policy: see above.
        limit: largest value that is no fault; > 0. A value that is not a number always is one.
    """

    policy: Policy
    limit: float

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise ValueError(f"limit={self.limit}: expected more than 0.")


@dataclass(frozen=True)
class FaultsConfig:
    """The policy for each fault.

    Attributes:
        not_finite: there is no update in any case.
        loss_spike: its limit is in nats per token.
        unconverged_solve: a relative residual, at least `rtol` of the stopping rule.
        unconverged_adjoint: likewise of the adjoint's, in the model section and in every phase.
    """

    not_finite: Literal["retry", "skip", "raise"]
    loss_spike: FaultConfig
    unconverged_solve: FaultConfig
    unconverged_adjoint: FaultConfig

    def policy(self, fault: str) -> Policy:
        """Of the fault of that name."""
        setting = getattr(self, fault)
        return setting.policy if isinstance(setting, FaultConfig) else setting

    def ignored(self) -> FaultsConfig:
        """The same, with nothing but a count of all that can be ignored."""
        changed = {name: replace(getattr(self, name), policy="ignore") for name in FAULTS if name != "not_finite"}
        return replace(self, **changed)


@dataclass
class Account:
    """How often each fault happened, over all processes.

    Attributes:
        num_steps: by the name of the fault, steps that had it, and still had it if they were computed once more.
        num_retried: steps that were computed once more.
        num_skipped: steps without an update.
    """

    num_steps: dict[str, int] = field(default_factory=dict)
    num_retried: int = 0
    num_skipped: int = 0

    def count(self, faults: Iterable[str], *, updated: bool) -> None:
        """Add one step."""
        for name in faults:
            self.num_steps[name] = self.num_steps.get(name, 0) + 1
        self.num_skipped += not updated


@dataclass(frozen=True)
class WorstSolve:
    """Where the largest residual of a step's solves is.

    Attributes:
        residual: relative; inf for one that is not a number, -inf if nothing was solved.
        segment: counted from the first of the step.
        stream: over all processes.
    """

    residual: float
    segment: int
    stream: int

    def to_mapping(self) -> dict[str, float | int | None] | None:
        """Plain data; None if nothing was solved."""
        if self.residual == -math.inf:
            return None
        return {**asdict(self), "residual": self.residual if math.isfinite(self.residual) else None}


FAULTS = tuple(FaultsConfig.__dataclass_fields__)
"""Names of the faults."""


def find_faults(
    config: FaultsConfig,
    *,
    finite: bool,
    nats_per_token: float,
    mean_nats_per_token: float | None,
    solver_residual: float,
    adjoint_residual: float,
) -> dict[str, float | None]:
    """The faults of a step and what was measured of each, None where that is not finite.

    Args:
        config: with the limits.
        finite: whether loss and gradient are, on every process.
        nats_per_token: of the step.
        mean_nats_per_token: of the steps before; None for the first one.
        solver_residual: largest of all forward solves, inf for one that is not a number; 0 without a solve.
        adjoint_residual: likewise.
    """
    if not finite:
        return {"not_finite": None}
    values = {
        "loss_spike": 0.0 if mean_nats_per_token is None else nats_per_token - mean_nats_per_token,
        "unconverged_solve": solver_residual,
        "unconverged_adjoint": adjoint_residual,
    }
    return {
        name: value if math.isfinite(value) else None
        for name, value in values.items()
        if value > getattr(config, name).limit
    }


def worst_solve(solves: Mapping[str, Sequence[float]], *, rank: int, num_streams: int) -> WorstSolve:
    """The worst of a process's solves.

    Args:
        solves: "solver_residuals" and "adjoint_residuals", one number per segment and stream in this order.
        rank: of the process.
        num_streams: that it has.
    """
    residuals = [
        (nan_as_inf(residual), i)
        for name in ("solver_residuals", "adjoint_residuals")
        for i, residual in enumerate(solves.get(name, ()))
    ]
    residual, i = max(residuals, key=lambda found: found[0], default=(-math.inf, 0))
    return WorstSolve(residual, segment=i // num_streams, stream=rank * num_streams + i % num_streams)


def nan_as_inf(value: float) -> float:
    """The value, and inf for NaN: worse than any other."""
    return math.inf if math.isnan(value) else value


def sternest_policy(config: FaultsConfig, faults: Mapping[str, float | None], *, may_retry: bool) -> Policy:
    """What becomes of a step with these faults; `retry` is `skip` the second time."""
    policies: list[Policy] = ["ignore", *(config.policy(name) for name in faults)]
    policy: Policy = max(policies, key=_STERNNESS.index)
    return "skip" if policy == "retry" and not may_retry else policy


def give_up(step: int, config: FaultsConfig, faults: Mapping[str, float | None], *, num_skipped_in_a_row: int) -> None:
    """Raise if the step at hand must be the last, before anything is written of it; on all processes or none.

    Raises:
        FloatingPointError: loss or gradient are not finite, or the loss has jumped.
        SolveError: a solve did not converge.
    """
    too_many = num_skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW
    ends: tuple[Policy, ...] = ("skip", "retry", "raise") if too_many else ("raise",)
    final = [name for name in faults if config.policy(name) in ends]
    if not final:
        return
    found = "; ".join(_in_words(name, faults[name], config) for name in final)
    count = f"; no update for {MAX_SKIPPED_IN_A_ROW} steps in a row" if too_many else ""
    error = FloatingPointError if {"not_finite", "loss_spike"} & set(final) else SolveError
    raise error(
        f"step {step}: {found}{count}. The checkpoints are as they were: "
        + (
            f"continue with --resume and training.faults.{final[0]}.policy=warn, or begin"
            if "not_finite" not in final
            else "begin"
        )
        + f" a new run with {' or '.join(_REMEDIES[name] for name in final)}, or a lower training.optimizer.lr."
    )


def describe_faults(step: int, config: FaultsConfig, account: Account, num_steps: int) -> list[str]:
    """A line for each fault of the latest `num_steps` steps whose policy is not to ignore it."""
    return [
        f"step {step}: warning: {_IN_WORDS[name]} in {account.num_steps[name]} of {num_steps} steps "
        f"({_limit(name, config)}policy {config.policy(name)})"
        for name in FAULTS
        if account.num_steps.get(name) and config.policy(name) != "ignore"
    ]


def describe_account(account: Account, num_steps: int) -> str:
    """How often each fault happened in all steps of a run, in one line."""
    if not account.num_steps and not account.num_retried:
        return f"faults in {num_steps:,} steps: none"
    counts = ", ".join(f"{name} {account.num_steps[name]:,}" for name in FAULTS if name in account.num_steps)
    return (
        f"faults in {num_steps:,} steps: {counts or 'none that stayed'}; {account.num_retried:,} steps computed once more, "
        f"{account.num_skipped:,} without an update"
    )


def _in_words(name: str, value: float | None, config: FaultsConfig) -> str:
    number = "inf" if value is None else f"{value:.2g}"
    return _IN_WORDS[name] + ("" if name == "not_finite" else f" ({_limit(name, config)}value {number})")


def _limit(name: str, config: FaultsConfig) -> str:
    return "" if name == "not_finite" else f"training.faults.{name}.limit {getattr(config, name).limit:g}, "


_IN_WORDS = {
    "not_finite": "loss or gradient not finite",
    "loss_spike": "the loss rose above its running mean",
    "unconverged_solve": "a forward solve did not converge",
    "unconverged_adjoint": "an adjoint solve did not converge",
}

_REMEDIES = {
    "not_finite": "a lower training.clip_norm",
    "loss_spike": "a lower training.clip_norm",
    "unconverged_solve": "a larger model.stopping.max_steps or training.jacobian.weight",
    "unconverged_adjoint": "a larger model.adjoint.stopping.max_steps or training.jacobian.weight",
}
