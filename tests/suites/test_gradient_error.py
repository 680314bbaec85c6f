"""Errors of the gradient of a trained model, measured again against one that no solver of fixed points has a part in."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deq_lm.adjoints import JacobianFree, Unrolled
from deq_lm.errors import ConfigError
from deq_lm.solvers import Picard, StoppingRule
from deq_lm.suites import gradient_error
from deq_lm.suites.config import GradientConfig
from deq_lm.suites.convergence import segments_of
from deq_lm.suites.gradient_error import AS_IN_TRAINING, measure_gradient_errors

CPU = torch.device("cpu")


def implicit(rtol: float) -> GradientConfig:
    adjoint = {"name": "implicit", "stopping": {"rtol": rtol, "max_steps": 60}}
    return GradientConfig(stopping=StoppingRule(rtol=rtol, max_steps=60), adjoint=adjoint)


def errors(subject, model=None, **gradients):
    found = measure_gradient_errors(model or subject.trained(CPU), segments_of(subject, "test", 2), gradients)
    return {error.gradient: error for error in found}


def gradient(model, segment, memory, **options) -> torch.Tensor:
    output = model(segment.input_ids, targets=segment.targets, memory=memory, **options)
    return torch.cat([part.flatten().double() for part in torch.autograd.grad(output.loss, list(model.parameters()))])


def test_errors_are_those_against_plain_iteration_backpropagated_in_float64(subjects):
    found = errors(subjects[0], one_step=GradientConfig(adjoint={"name": "jacobian_free"}))
    model, exact_model = subjects[0].trained(CPU), subjects[0].trained(CPU).double()
    exact_model.model.layers.solver, exact_model.model.layers.adjoint = Picard(), Unrolled()
    first, second = segments_of(subjects[0], "test", 2)
    with torch.no_grad():
        memory = model(first.input_ids).memory
    wider = replace(memory, z=memory.z.double(), x=memory.x.double())
    exact = gradient(exact_model, second, wider, stopping=StoppingRule.fixed(150))
    rule = model.model.layers.stopping
    for name, options in ((AS_IN_TRAINING, {}), ("one_step", {"adjoint": JacobianFree()})):
        own = gradient(model, second, memory, stopping=rule, **options)
        assert found[name].relative_error == pytest.approx(((own - exact).norm() / exact.norm()).item(), rel=1e-3)
        assert found[name].cosine == pytest.approx(torch.cosine_similarity(own, exact, dim=0).item(), rel=1e-6)


def test_tighter_solves_have_smaller_errors(subjects):
    found = errors(subjects[0], loose=implicit(1e-1), tight=implicit(1e-5))
    assert list(found) == [AS_IN_TRAINING, "loose", "tight"]
    assert found["tight"].relative_error < 1e-3 < found["loose"].relative_error
    assert found["tight"].residual <= 1e-5 < found["loose"].residual <= 1e-1
    assert found["tight"].adjoint_residual <= 1e-5 < found["loose"].adjoint_residual <= 1e-1
    assert found["tight"].evaluations > found["loose"].evaluations


def test_a_gradient_without_an_adjoint_solve_has_no_facts_of_one(subjects):
    found = errors(subjects[0], phantom=GradientConfig(adjoint={"name": "phantom", "num_steps": 2}))
    assert (found["phantom"].adjoint_evaluations, found["phantom"].adjoint_residual) == (None, None)


def test_dropout_is_off_and_the_model_is_left_as_it_was(subjects):
    model = subjects[0].trained(CPU).train()
    expected = errors(subjects[0])[AS_IN_TRAINING]
    model.model.layers.cell.config = replace(model.model.layers.cell.config, dropout=0.5)
    assert errors(subjects[0], model)[AS_IN_TRAINING] == expected
    assert model.training
    assert all(parameter.grad is None and parameter.dtype == torch.float32 for parameter in model.parameters())


def test_the_name_of_the_gradient_of_training_is_taken(subjects):
    with pytest.raises(ConfigError, match="'as in training' is always measured"):
        errors(subjects[0], **{AS_IN_TRAINING: implicit(1e-3)})


def test_a_reference_that_has_not_converged_is_none(subjects, monkeypatch):
    monkeypatch.setattr(gradient_error, "CLOSE", StoppingRule(rtol=1e-10, max_steps=3))
    found = errors(subjects[0])[AS_IN_TRAINING]
    assert (found.relative_error, found.cosine) == (None, None)


@pytest.mark.parametrize(
    ("adjoint", "message"),
    [
        ({"name": "phantoms"}, "convergence.gradients.odd.adjoint.name: the text 'phantoms' is not known"),
        ({"name": "unrolled"}, "convergence.gradients.odd.adjoint: "),
    ],
)
def test_an_adjoint_that_cannot_be_is_named(subjects, adjoint, message):
    with pytest.raises(ConfigError, match=message):
        errors(subjects[0], odd=GradientConfig(adjoint=adjoint))
