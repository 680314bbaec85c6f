"""The learning rate over the steps: a linear warm-up, then one of three ways on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers.optimization import get_scheduler


@dataclass(frozen=True)
class ScheduleConfig:
    """Settings of the schedule.

    Attributes:
        name: "constant", "linear" (to zero) or "cosine" (to `final_lr_ratio`), after the warm-up.
        warmup_steps: steps over which the rate rises linearly from zero; 0 is none.
        decay_steps: the step at which the decay ends, warm-up included; None is the run's max_steps. Give it
            when a run will be continued with more steps, so that the schedule does not change under it. None
            for "constant".
        final_lr_ratio: for "cosine", the last rate as a fraction of the peak, in [0, 1]; None otherwise.
    """

    name: Literal["constant", "linear", "cosine"]
    warmup_steps: int
    decay_steps: int | None
    final_lr_ratio: float | None

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps}: expected 0 (no warm-up) or more.")
        if self.decay_steps is not None and self.decay_steps <= self.warmup_steps:
            raise ValueError(
                f"decay_steps={self.decay_steps}: expected more than warmup_steps={self.warmup_steps}, "
                "which it includes, or null for max_steps."
            )
        if self.name == "constant" and self.decay_steps is not None:
            raise ValueError(f"decay_steps={self.decay_steps} with name constant has no effect: write null.")
        if (self.name == "cosine") != (self.final_lr_ratio is not None):
            raise ValueError(
                f"final_lr_ratio={self.final_lr_ratio} with name {self.name}: a cosine needs a value in "
                "[0, 1], the others take null."
            )
        if self.final_lr_ratio is not None and not 0 <= self.final_lr_ratio <= 1:
            raise ValueError(f"final_lr_ratio={self.final_lr_ratio}: expected a value in [0, 1].")


def make_schedule(optimizer: Optimizer, config: ScheduleConfig, *, max_steps: int) -> LRScheduler:
    """The schedule, to be stepped once per optimizer step; its rate is a function of the step alone."""
    name = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine_with_min_lr"}[config.name]
    return get_scheduler(
        name,
        optimizer,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=config.decay_steps or max_steps,
        scheduler_specific_kwargs={"min_lr_rate": config.final_lr_ratio} if config.name == "cosine" else None,
    )
