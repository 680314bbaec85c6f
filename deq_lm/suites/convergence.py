"""How the solves of a trained equilibrium converge, by solver, position and start, and what its gradient is worth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from deq_lm.cells import BoundCell
from deq_lm.data.streams import ContiguousStreams, Segment
from deq_lm.equilibrium import Equilibrium
from deq_lm.evaluation.contraction import noted_bindings
from deq_lm.evaluation.modes import device_of, measuring, seeded
from deq_lm.evaluation.records import Record, provenance
from deq_lm.evaluation.token_loss import finite
from deq_lm.modeling import DEQLMForCausalLM
from deq_lm.modeling.builders import build_solver
from deq_lm.regularizers import jacobian_frobenius
from deq_lm.regularizers.jacobian import spectral_radius
from deq_lm.solvers import FixedPointSolver, Solution, StoppingRule, solve
from deq_lm.structure import to_mapping
from deq_lm.suites.config import ConvergenceSettings
from deq_lm.suites.gradient_error import GradientError, measure_gradient_errors
from deq_lm.suites.guarantees import Guarantee, measure_guarantees
from deq_lm.suites.subjects import Subject

OTHER_START_SEED = 1
"""Of the start that is not zero."""


@dataclass(frozen=True, kw_only=True)
class BudgetPoint:
    """Solves of one budget, by one solver. Residuals are relative: ||f(z) - z|| / ||f(z)||, of whole sequences.

    Attributes:
        solver: its name, with its scope.
        num_evaluations: the budget.
        median_residual, residual_95, max_residual: over the solves; None where not finite.
        nats_per_token: of the targets; None if it is not finite.
    """

    solver: str
    num_evaluations: int
    median_residual: float | None
    residual_95: float | None
    max_residual: float | None
    nats_per_token: float | None


@dataclass(frozen=True, kw_only=True)
class TwoStarts:
    """Solves from the model's own start and from random states of the equilibrium's size, at the largest budget.

    Attributes:
        median_distance, max_distance: between the two solutions, relative to the first's norm; None if not finite.
        nats_per_token: from its own start.
        other_nats_per_token: from the other start.
    """

    median_distance: float | None
    max_distance: float | None
    nats_per_token: float | None
    other_nats_per_token: float | None


@dataclass(frozen=True, kw_only=True)
class Contraction:
    """How strongly the cell contracts at its equilibria.

    Attributes:
        step: of training.
        median_spectral_radius, max_spectral_radius: largest modulus of an eigenvalue of df/dz, over the sequences.
        jacobian_norm: root mean square over the state's entries of the norm of a column of df/dz.
        median_residual: of the solves, by the rule of evaluation.
    """

    step: int
    median_spectral_radius: float | None
    max_spectral_radius: float | None
    jacobian_norm: float | None
    median_residual: float | None


@dataclass(frozen=True, kw_only=True)
class ConvergenceResult(Record):
    """Solves of one trained equilibrium, on segments of the test split.

    Attributes:
        suite: its name.
        model: its name in the suite.
        seed: of the run.
        recipe: of the run.
        settings: how it was measured.
        budgets: residual and loss against the budget, by solver; the model's own first.
        position_residuals: of the model's solver, at each budget (a row) by position (a column): the median over the
            sequences of ||f(z) - z|| / ||f(z)|| at that position alone; null where not finite.
        two_starts: whether two starts end in one equilibrium.
        contraction: at each checkpoint, rising; the last is of the final model.
        guarantees: by splitting, of a cell that has them.
        gradients: errors against the exact one, that of training first.
    """

    kind: ClassVar[str] = "convergence"

    suite: str
    model: str
    seed: int
    recipe: Mapping[str, Any]
    settings: ConvergenceSettings
    budgets: tuple[BudgetPoint, ...]
    position_residuals: tuple[tuple[float | None, ...], ...]
    two_starts: TwoStarts
    contraction: tuple[Contraction, ...]
    guarantees: tuple[Guarantee, ...] = ()
    gradients: tuple[GradientError, ...] = ()


def measure_convergence(
    suite: str, subject: Subject, settings: ConvergenceSettings, device: torch.device
) -> ConvergenceResult:
    """Solve the same segments again and again; memory is always that of the model's own full solves.

    Args:
        suite: its name, for the record.
        subject: a trained equilibrium.
        settings: how.
        device: where.

    Raises:
        CheckpointError: it is not trained.
        ConfigError: an unknown solver or adjoint, or an adjoint that does not go with the model's solver.
    """
    model = subject.trained(device)
    segments = segments_of(subject, "test", settings.num_segments)
    gradients = tuple(measure_gradient_errors(model, segments, settings.gradients))
    solves = _Solves(model, segments)
    own = solves.layers.solver
    others = [build_solver({"name": name}, "convergence.solvers") for name in settings.solvers]
    budgets, position_residuals = [], []
    for solver in [own, *(other for other in others if type(other) is not type(own))]:
        for num_evaluations in settings.num_evaluations:
            found = list(solves.run(solver, StoppingRule.fixed(num_evaluations - 1)))
            budgets.append(_budget_point(solver, num_evaluations, found))
            if solver is own:
                position_residuals.append(_position_residuals(found))
    return ConvergenceResult(
        **provenance(),
        suite=suite,
        model=subject.name,
        seed=subject.seed,
        recipe=to_mapping(subject.recipe),
        settings=settings,
        budgets=tuple(budgets),
        position_residuals=tuple(position_residuals),
        two_starts=_two_starts(solves, StoppingRule.fixed(settings.num_evaluations[-1] - 1)),
        contraction=tuple(_over_training(subject, segments, settings, device)),
        guarantees=tuple(solves.guarantees()),
        gradients=gradients,
    )


@dataclass(frozen=True)
class _Solved:
    """One segment of all streams."""

    solution: Solution
    nll_nats: float
    num_targets: int


class _Solves:
    """The solves of the segments, bound once: embedded tokens, memory, targets."""

    def __init__(self, model: DEQLMForCausalLM, segments: Sequence[Segment]) -> None:
        assert isinstance(model.model.layers, Equilibrium)
        self.model, self.layers = model, model.model.layers
        self.bound: list[tuple[BoundCell, Tensor, Tensor]] = []  # f, where its solve begins, targets
        memory, device = None, device_of(model)
        for segment in segments:
            with measuring(model), noted_bindings(self.layers) as bindings:
                memory = model(segment.input_ids.to(device), memory=memory, return_logits=False).memory
                ((f, x),) = bindings
                start = self.layers.proposed_start(x)
            if start is None:
                start = torch.zeros_like(self.layers.cell.as_state(x))
            self.bound.append((f, start, segment.targets.to(device)))

    def run(
        self, solver: FixedPointSolver, stopping: StoppingRule, starts: Sequence[Tensor] | None = None
    ) -> Iterator[_Solved]:
        """Each segment, from where the model begins or from `starts`."""
        for i, (f, start, targets) in enumerate(self.bound):
            with measuring(self.model):
                solution = solve(f, start if starts is None else starts[i], solver=solver, stopping=stopping)
                hidden = self.layers.cell.read_out(solution.image.to(start.dtype))
                nll, num_targets = self.model.lm_head.nll(hidden, targets, self.model.model.embed_tokens)
            yield _Solved(solution, nll.item(), int(num_targets))

    def guarantees(self) -> Iterator[Guarantee]:
        """What is proved of the cell, and measured of it to the tolerance of evaluation."""
        with measuring(self.model):
            bound = [(f, start) for f, start, _ in self.bound]
            yield from measure_guarantees(bound, self.layers.evaluation_stopping.rtol)


def segments_of(subject: Subject, split: str, num_segments: int) -> list[Segment]:
    """The first segments of all streams of a split, as evaluation cuts it.

    Raises:
        CheckpointError: the subject is not trained, so that there is no tokenizer.
    """
    config = subject.recipe.evaluation
    streams = ContiguousStreams(
        subject.corpus().splits[split].tokens,
        num_streams=config.batch_size,
        segment_length=config.segment_length,
        rank=0,
        num_ranks=1,
        drop_remainder=True,
    )
    return [streams.next_segment() for _ in range(num_segments)]


def _nats_per_token(found: Sequence[_Solved]) -> float | None:
    return finite(sum(solved.nll_nats for solved in found) / sum(solved.num_targets for solved in found))


def _budget_point(solver: FixedPointSolver, num_evaluations: int, found: Sequence[_Solved]) -> BudgetPoint:
    residuals = torch.cat([solved.solution.relative_residual for solved in found])
    median, upper, largest = _quantiles(residuals, 0.5, 0.95, 1.0)
    name = type(solver).__name__
    return BudgetPoint(
        solver=name if name == "Picard" else f"{name} ({solver.scope})",
        num_evaluations=num_evaluations,
        median_residual=median,
        residual_95=upper,
        max_residual=largest,
        nats_per_token=_nats_per_token(found),
    )


def _position_residuals(found: Sequence[_Solved]) -> tuple[float | None, ...]:
    """The median of ||f(z) - z|| / ||f(z)|| over the sequences, for each position."""
    by_position = torch.cat(
        [
            (solved.solution.image - solved.solution.z).flatten(2).norm(dim=2)
            / solved.solution.image.flatten(2).norm(dim=2).clamp_min(torch.finfo(torch.float32).tiny)
            for solved in found
        ]
    )  # (segments * B, L)
    return tuple(map(finite, by_position.median(dim=0).values.tolist()))


def _two_starts(solves: _Solves, stopping: StoppingRule) -> TwoStarts:
    first = list(solves.run(solves.layers.solver, stopping))
    with seeded(OTHER_START_SEED, device_of(solves.model)):
        starts = [torch.randn_like(solved.solution.z) * solved.solution.z.std() for solved in first]
    second = list(solves.run(solves.layers.solver, stopping, starts))
    distances = torch.cat(
        [
            (b.solution.z - a.solution.z).flatten(1).norm(dim=1) / a.solution.z.flatten(1).norm(dim=1)
            for a, b in zip(first, second, strict=True)
        ]
    )
    median, largest = _quantiles(distances, 0.5, 1.0)
    return TwoStarts(
        median_distance=median,
        max_distance=largest,
        nats_per_token=_nats_per_token(first),
        other_nats_per_token=_nats_per_token(second),
    )


def _over_training(
    subject: Subject, segments: Sequence[Segment], settings: ConvergenceSettings, device: torch.device
) -> Iterator[Contraction]:
    """Of the checkpoints that are left, and of the final model."""
    last = subject.recipe.training.max_steps
    folders = sorted(subject.run.checkpoints.glob("step_*")) if settings.checkpoints else []
    steps = {int(folder.name.removeprefix("step_")): folder for folder in folders if folder.is_dir()}
    for step, folder in sorted({**steps, last: subject.run.final}.items()):
        yield _contraction(step, subject.trained(device, folder=folder), segments)


def _contraction(step: int, model: DEQLMForCausalLM, segments: Sequence[Segment]) -> Contraction:
    """At the equilibria of the last segment, which has the most memory."""
    solves = _Solves(model, segments)
    *_, last = solves.run(solves.layers.solver, solves.layers.evaluation_stopping)
    f = solves.bound[-1][0]
    with measuring(model, training=True), seeded(0, device_of(model)):
        radii = spectral_radius(f, last.solution.z)
        jacobian = jacobian_frobenius(f, last.solution.z)
    median_radius, max_radius = _quantiles(radii, 0.5, 1.0)
    (median_residual,) = _quantiles(last.solution.relative_residual, 0.5)
    return Contraction(
        step=step,
        median_spectral_radius=median_radius,
        max_spectral_radius=max_radius,
        jacobian_norm=finite(jacobian.item() ** 0.5),
        median_residual=median_residual,
    )


def _quantiles(values: Tensor, *shares: float) -> list[float | None]:
    """Of the values, where one that is not finite is larger than any other; None where the quantile is not finite."""
    numbers = values.detach().double().cpu().numpy()
    numbers = np.where(np.isfinite(numbers), numbers, np.inf)
    return [finite(float(number)) for number in np.quantile(numbers, shares, method="higher")]
