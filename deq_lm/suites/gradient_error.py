"""How far the gradient of training is from the exact one of the equilibrium, on a trained model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from deq_lm.adjoints import Adjoint, Implicit
from deq_lm.cells.memory import Memory
from deq_lm.data.streams import Segment
from deq_lm.equilibrium import Equilibrium
from deq_lm.errors import ConfigError
from deq_lm.evaluation.modes import device_of, measuring
from deq_lm.evaluation.token_loss import finite
from deq_lm.modeling import DEQLMForCausalLM
from deq_lm.modeling.builders import build_adjoint
from deq_lm.solvers import Broyden, Outcome, Solution, StoppingRule
from deq_lm.suites.config import GradientConfig

AS_IN_TRAINING = "as in training"
"""The name of the gradient by the model's own settings, which training comes to after its phases."""

CLOSE = StoppingRule(max_steps=2000, rtol=1e-10, patience=None, divergence_factor=None)
EXACT = Implicit(solver=Broyden(scope="sequence", history_size=30), stopping=CLOSE)
"""Both solves of what counts as exact, in float64."""


@dataclass(frozen=True, kw_only=True)
class GradientError:
    """The gradient of the loss of one segment, all parameters together, in float32, without regularization and dropout.

    Residuals are relative, and medians over the sequences.

    Attributes:
        gradient: how it was computed: `AS_IN_TRAINING`, or a name in `ConvergenceSettings.gradients`.
        evaluations: of the cell in the forward solve, mean; without those that are then differentiated.
        residual: of the forward solve.
        adjoint_evaluations, adjoint_residual: of the adjoint solve; None without one.
        relative_error: ||g - g*|| / ||g*||, with g* of the same weights and text in float64, both solves as close as
            `EXACT`; None where these do not get there, or g is not finite.
        cosine: of the angle between the two; likewise.
    """

    gradient: str
    evaluations: float
    residual: float | None
    adjoint_evaluations: float | None
    adjoint_residual: float | None
    relative_error: float | None
    cosine: float | None


def measure_gradient_errors(
    model: DEQLMForCausalLM, segments: Sequence[Segment], gradients: Mapping[str, GradientConfig]
) -> Iterator[GradientError]:
    """Differentiate the loss of the last segment, as in training first.

    Args:
        model: an equilibrium; left as it was found.
        segments: of a few streams; those before the last leave their memory to it.
        gradients: other ways to compute it, by name.

    Raises:
        ConfigError: an adjoint is unknown, or does not go with the model's solver, or a name is that of training's.
    """
    layers = model.model.layers
    assert isinstance(layers, Equilibrium)
    if AS_IN_TRAINING in gradients:
        raise ConfigError(f"convergence.gradients: {AS_IN_TRAINING!r} is always measured. Give another name.")
    ways = {AS_IN_TRAINING: (layers.stopping, layers.adjoint)}
    ways |= {name: _way(layers, config, f"convergence.gradients.{name}") for name, config in gradients.items()}
    memory = None
    for segment in segments[:-1]:
        with measuring(model):
            memory = model(segment.input_ids.to(device_of(model)), memory=memory, return_logits=False).memory
    exact = _differentiate(deepcopy(model).double(), segments[-1], memory, CLOSE, EXACT)
    for name, way in ways.items():
        yield _compare(name, _differentiate(model, segments[-1], memory, *way), exact)


def _way(layers: Equilibrium, config: GradientConfig, where: str) -> tuple[StoppingRule, Adjoint]:
    adjoint = layers.adjoint if config.adjoint is None else build_adjoint(config.adjoint, f"{where}.adjoint")
    try:
        adjoint.check(layers.solver)
    except ValueError as error:
        raise ConfigError(f"{where}.adjoint: {error}") from error
    return config.stopping or layers.stopping, adjoint


@dataclass(frozen=True)
class _Gradient:
    """The gradient, (N,) float64, and the solves behind it."""

    values: Tensor
    solution: Solution
    adjoint_solution: Solution | None

    @property
    def has_converged(self) -> bool:
        solves = [solution for solution in (self.solution, self.adjoint_solution) if solution is not None]
        return all(bool((solution.outcome == Outcome.CONVERGED).all()) for solution in solves)


def _differentiate(
    model: DEQLMForCausalLM, segment: Segment, memory: Memory | None, stopping: StoppingRule, adjoint: Adjoint
) -> _Gradient:
    parameters = list(model.parameters())
    if memory is not None:
        dtype = parameters[0].dtype
        memory = replace(memory, z=memory.z.to(dtype), x=memory.x.to(dtype))
    with measuring(model), torch.enable_grad():
        output = model(
            segment.input_ids.to(device_of(model)),
            targets=segment.targets.to(device_of(model)),
            memory=memory,
            stopping=stopping,
            adjoint=adjoint,
            return_logits=False,
        )
        gradient = torch.autograd.grad(output.loss, parameters, allow_unused=True, materialize_grads=True)
    assert isinstance(model.model.layers, Equilibrium)
    values = torch.cat([part.flatten().double() for part in gradient])
    return _Gradient(values, output.solution, model.model.layers.adjoint_solution)


def _compare(name: str, found: _Gradient, exact: _Gradient) -> GradientError:
    adjoint = found.adjoint_solution
    known = exact.has_converged
    error = (found.values - exact.values).norm() / exact.values.norm()
    cosine = F.cosine_similarity(found.values, exact.values, dim=0)
    return GradientError(
        gradient=name,
        evaluations=found.solution.num_evaluations.double().mean().item(),
        residual=finite(found.solution.relative_residual.median().item()),
        adjoint_evaluations=None if adjoint is None else adjoint.num_evaluations.double().mean().item(),
        adjoint_residual=None if adjoint is None else finite(adjoint.relative_residual.median().item()),
        relative_error=finite(error.item()) if known else None,
        cosine=finite(cosine.item()) if known else None,
    )
