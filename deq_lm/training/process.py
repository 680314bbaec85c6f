"""What launcher and operating system tell a run: how many processes were meant, that it is to stop, that memory is out."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from deq_lm.errors import ConfigError, Interrupted
from deq_lm.modeling.builders import build_solver
from deq_lm.training.recipe import Recipe

logger = logging.getLogger(__name__)


def check_processes(num_processes: int) -> None:
    """Notice a launch on CPUs that did not start what it was asked for.

    The simple launcher of `accelerate launch`, which it takes for CPUs, sets an address to meet at but starts a single
    process and says nothing: a warning. Its launcher for GPUs starts all, but on a machine without any each is alone.

    Raises:
        ConfigError: the processes do not know of each other.
    """
    environment = os.environ
    how = "ACCELERATE_USE_CPU=true accelerate launch --config_file recipes/accelerate/cpu_2.yaml ..."
    if num_processes == 1 and int(environment.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError(
            f"{environment['WORLD_SIZE']} processes were started that do not know of each other, since there is no GPU; to "
            f"run several on CPUs: {how}"
        )
    if num_processes == 1 and "MASTER_PORT" in environment and "WORLD_SIZE" not in environment:
        logger.warning(
            "accelerate launch was asked for several processes but started one; to run several on CPUs: %s", how
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory left; on a CPU, PyTorch says so in the text of a RuntimeError only."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def describe_out_of_memory(recipe: Recipe) -> str:
    """What a step of the recipe holds, and what to lower, in one line."""
    training, config = recipe.training, recipe.model_config
    sequences, length = training.batch_size, training.segment_length
    held = ""
    if config.depth == "equilibrium":
        history = getattr(build_solver(config.solver, "model.solver"), "history_size", 0)
        megabytes = (2 * history + 6) * sequences * length * config.d_model * 4 / 1e6
        held = f", and a solve about {megabytes:,.0f} MB with model.solver.history_size={history}"
    return (
        f"out of memory. A step holds {sequences} streams of {length} tokens over all processes{held}. Lower "
        "training.batch_size and raise training.gradient_accumulation instead, or lower training.segment_length or "
        "model.solver.history_size, or take model.cell.recompute=block. Then continue with --resume, or begin anew where "
        "a setting decides the updates."
    )


class StopSignal:
    """Turns the first SIGINT or SIGTERM into a note for the training loop; a second one acts at once, as usual.

    The loop looks at it once a step, and what is measured in between breaks off (`breaks_off`).

    Attributes:
        number: of the signal that came, or None.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    @contextmanager
    def breaks_off(self, model: nn.Module, accelerator: Accelerator | None = None) -> Iterator[None]:
        """Inside, once the signal has come, the next forward pass of `model` raises `Interrupted` instead.

        Args:
            model: not wrapped.
            accelerator: of several processes, all of which make the same number of passes: a signal to one of them
                breaks off the same pass of each.
        """

        def look(*_: object) -> None:
            has_come = torch.tensor(int(self.number is not None))
            if accelerator is not None:
                has_come = accelerator.reduce(has_come.to(accelerator.device))
            if has_come:
                raise Interrupted

        hook = model.register_forward_pre_hook(look)
        try:
            yield
        finally:
            hook.remove()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
