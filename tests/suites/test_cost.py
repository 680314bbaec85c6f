"""Operations counted by hand, expectations over phases and regularization, and times of every model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from deq_lm.errors import CheckpointError
from deq_lm.suites.config import CostSettings
from deq_lm.suites.cost import ModelCost, count_flops, measure_cost
from deq_lm.suites.training_step import RepeatedStep, steady
from deq_lm.training.phases import PhaseConfig
from deq_lm.training.run_folder import RunFolder

CPU = torch.device("cpu")


def costs_of(subjects) -> dict[str, ModelCost]:
    return {row.model: row for row in measure_cost("tiny", subjects, CostSettings(rounds=1), CPU).rows}


def with_training(subject, **settings):
    return replace(subject, recipe=replace(subject.recipe, training=replace(subject.recipe.training, **settings)))


def test_a_product_of_matrices_is_two_operations_a_multiplication():
    a, b = torch.ones(3, 4), torch.ones(4, 5, requires_grad=True)
    assert count_flops(lambda: a @ b) == 2 * 3 * 4 * 5
    assert count_flops(lambda: (a @ b).sum().backward()) == 2 * 2 * 3 * 4 * 5


def test_attention_counts_whatever_kernel_would_run_it():
    query, attention = torch.ones(2, 3, 7, 4), nn.functional.scaled_dot_product_attention
    assert count_flops(lambda: attention(query, query, query)) == 2 * 2 * (2 * 3 * 7 * 7 * 4)


def test_an_unrolled_model_costs_the_same_in_every_step(subjects):
    row = costs_of([subjects[1]])["unrolled"]
    assert row.training_flops == row.training_flops_per_token  # there are no phases
    assert row.training_evaluations is None
    assert row.adjoint_evaluations is None
    assert 2.5 < row.training_flops_per_token / row.inference_flops_per_token < 3.5  # backward is twice forward


def test_a_step_of_a_loaded_model_solves_as_training_does(subjects):
    subject = subjects[0]
    model = subject.trained(CPU)
    assert not model.training
    step = RepeatedStep(steady(subject.recipe, regularize=False), model, subject.corpus().splits["train"].tokens)
    step.run()
    assert model.training


def test_phases_and_regularization_count_by_their_share(subjects):
    """Up to the evaluations that other segments need."""
    subject = subjects[0]
    training = subject.recipe.training

    def flops(**settings) -> ModelCost:
        return costs_of([with_training(subject, **settings)])["equilibrium"]

    shallow = PhaseConfig(until=0.25, num_unrolled_steps=1)
    always = replace(training.jacobian, probability=1.0)
    plain, regularized = flops(phases=(), jacobian=None), flops(phases=(), jacobian=always)
    assert regularized.training_flops > plain.training_flops == plain.training_flops_per_token
    half = flops(phases=(), jacobian=replace(always, probability=0.5))
    middle = (plain.training_flops + regularized.training_flops) / 2
    assert half.training_flops == pytest.approx(middle, rel=0.03)
    mixed = flops(phases=(shallow,), jacobian=None)
    assert mixed.training_flops_per_token == pytest.approx(plain.training_flops_per_token, rel=0.03)
    quiet = training.faults.ignored()
    only = flops(phases=(replace(shallow, until=1.0),), jacobian=None, faults=quiet)
    assert mixed.training_flops == pytest.approx(0.25 * only.training_flops + 0.75 * plain.training_flops, rel=0.03)


def test_every_model_is_timed_and_an_equilibrium_has_evaluations(subjects):
    rows = costs_of(subjects)
    assert all(row.training_seconds > 0 and row.inference_seconds > 0 for row in rows.values())
    equilibrium = rows["equilibrium"]
    assert 1 <= equilibrium.inference_evaluations <= 7
    assert 1 <= equilibrium.training_evaluations <= 7
    assert equilibrium.adjoint_evaluations >= 1


def test_measuring_leaves_the_runs_weights_alone(subjects):
    before = {name: tensor.clone() for name, tensor in subjects[0].trained(CPU).state_dict().items()}
    costs_of(subjects)
    after = subjects[0].trained(CPU).state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_model_that_is_not_trained_has_no_cost(subjects, tmp_path):
    with pytest.raises(CheckpointError, match="no finished run of equilibrium"):
        costs_of([replace(subjects[0], run=RunFolder(tmp_path))])
