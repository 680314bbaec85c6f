"""The optimizer's settings and groups, and the learning rate over the steps."""

import math

import pytest
import torch
from torch import nn

from deq_lm.errors import ConfigError
from deq_lm.structure import build
from deq_lm.training.optimizer import OptimizerConfig, make_optimizer
from deq_lm.training.schedules import ScheduleConfig, make_schedule

OPTIMIZER = {"name": "adamw", "lr": 0.1, "betas": [0.9, 0.95], "weight_decay": 0.5, "eps": 1e-8}
SCHEDULE = {"name": "cosine", "warmup_steps": 4, "decay_steps": 20, "final_lr_ratio": 0.1}


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 4))
        self.bias = nn.Parameter(torch.ones(3))
        self.gain = nn.Parameter(torch.ones(3, 1))
        self.frozen = nn.Parameter(torch.ones(3, 4), requires_grad=False)


def test_only_matrices_are_decayed():
    model = Parts()
    optimizer = make_optimizer(model, build(OptimizerConfig, OPTIMIZER))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()  # without a gradient, only decay moves a weight: w - lr * decay * w
    moved = {name: parameter.flatten()[0].item() for name, parameter in model.named_parameters()}
    assert moved == {"weight": pytest.approx(0.95), "bias": 1, "gain": 1, "frozen": 1}


def test_adam_adds_the_decay_to_the_gradient_and_adamw_does_not():
    steps = {}
    for name in ("adam", "adamw"):
        model = Parts()
        optimizer = make_optimizer(model, build(OptimizerConfig, {**OPTIMIZER, "name": name}))
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
        steps[name] = 1 - model.weight[0, 0].item()
    assert steps["adamw"] == pytest.approx(0.1 * 0.5)
    assert steps["adam"] == pytest.approx(0.1, rel=1e-5)  # the first Adam step has length lr whatever the gradient


@pytest.mark.parametrize(
    "change", [{"lr": 0}, {"betas": [0.9, 1.0]}, {"weight_decay": -1}, {"eps": 0}, {"name": "adan"}, {"lr": "1e-3"}]
)
def test_optimizer_settings_out_of_range_are_refused(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        build(OptimizerConfig, {**OPTIMIZER, **change})


def rates(schedule: dict, max_steps: int, num_steps: int) -> list[float]:
    optimizer = make_optimizer(Parts(), build(OptimizerConfig, OPTIMIZER))
    scheduler = make_schedule(optimizer, build(ScheduleConfig, schedule), max_steps=max_steps)
    seen = []
    for _ in range(num_steps):
        seen.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return seen


def test_the_cosine_rises_linearly_then_falls_to_its_final_ratio():
    expected = [0.1 * step / 4 for step in range(4)]
    for step in range(4, 21):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 4) / 16))
        expected.append(0.1 * (0.1 + 0.9 * cosine))
    assert rates(SCHEDULE, 99, 21) == pytest.approx(expected)


def test_the_constant_stays_and_the_line_ends_at_zero():
    rest = {"decay_steps": None, "final_lr_ratio": None, "warmup_steps": 2}
    assert rates({"name": "constant", **rest}, 6, 6) == pytest.approx([0, 0.05, 0.1, 0.1, 0.1, 0.1])
    assert rates({"name": "linear", **rest}, 6, 7) == pytest.approx([0, 0.05, 0.1, 0.075, 0.05, 0.025, 0])


@pytest.mark.parametrize(
    "change",
    [
        {"warmup_steps": -1},
        {"decay_steps": 4},
        {"final_lr_ratio": None},
        {"final_lr_ratio": 1.5},
        {"name": "linear"},
        {"name": "constant", "final_lr_ratio": None},
    ],
)
def test_schedule_settings_that_contradict_each_other_are_refused(change):
    with pytest.raises(ConfigError):
        build(ScheduleConfig, {**SCHEDULE, **change})
