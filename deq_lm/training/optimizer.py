"""The optimizer: Adam or AdamW, with weight decay on matrices only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class OptimizerConfig:
    """Settings of Adam.

    Attributes:
        name: "adamw" decays the weights beside the gradient step, "adam" inside it (an L2 term).
        lr: peak learning rate, > 0; the schedule multiplies it.
        betas: decay rates of the two moment estimates, each in [0, 1).
        weight_decay: >= 0; applied to matrices, not to biases and gains.
        eps: added to the denominator, > 0.

    References:
        Kingma and Ba (2015), algorithm 1; Loshchilov and Hutter (2019), algorithm 2.
    """

    name: Literal["adamw", "adam"]
    lr: float
    betas: tuple[float, float]
    weight_decay: float
    eps: float

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr={self.lr}: expected more than 0, for example 1.0e-3.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={list(self.betas)}: expected two values in [0, 1), such as [0.9, 0.95].")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay={self.weight_decay}: expected 0 (none) or more.")
        if self.eps <= 0:
            raise ValueError(f"eps={self.eps}: expected more than 0, for example 1.0e-8.")


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Adam or AdamW over the trainable parameters of `model`, in two groups: decayed and not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if is_decayed(p)], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if not is_decayed(p)], "weight_decay": 0.0},
    ]
    algorithm = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[config.name]
    return algorithm(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def is_decayed(parameter: Tensor) -> bool:
    """Whether a parameter is a matrix: two axes longer than one, so that a gain of shape (n, 1) is none."""
    return sum(size > 1 for size in parameter.shape) >= 2
