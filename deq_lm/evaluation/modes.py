"""Measure a model without leaving a trace: its mode, its mixed precision and the random state are put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from deq_lm.cells import Cell


@contextmanager
def measuring(model: nn.Module, *, training: bool = False) -> Iterator[None]:
    """Inside, the model is in evaluation mode without gradients, or with `training` in training mode with them.

    It computes in the precision of its weights: mixed precision is off, also the kind that Accelerate attaches to a
    model it has prepared. A solve in bfloat16 cannot meet a tolerance of 1e-3, and the numbers in a training log would
    not be those of the saved model.
    """
    modes = [(module, module.training) for module in model.modules()]
    attributes = vars(model)
    mixed_precision_forward = attributes.get("forward")
    if "_original_forward" in attributes:  # where Accelerate keeps what it has wrapped
        attributes["forward"] = attributes["_original_forward"]
    model.train(training)
    try:
        with torch.set_grad_enabled(training), torch.autocast(device_of(model).type, enabled=False):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        if "_original_forward" in attributes:
            attributes["forward"] = mixed_precision_forward


@contextmanager
def remembering(model: nn.Module, mem_len: int | None) -> Iterator[None]:
    """Inside, segments leave `mem_len` positions of memory to the next ones; None is as many as the model's own."""
    cells = [module for module in model.modules() if isinstance(module, Cell)]
    own = [cell.mem_len for cell in cells]
    try:
        for cell in cells:
            cell.mem_len = cell.mem_len if mem_len is None else mem_len
        yield
    finally:
        for cell, length in zip(cells, own, strict=True):
            cell.mem_len = length


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, the global random state starts from `seed`; afterwards it is what it was before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def device_of(model: nn.Module) -> torch.device:
    """Where the parameters are."""
    return next(model.parameters()).device
