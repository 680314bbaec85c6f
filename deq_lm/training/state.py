"""TrainingState: all that a step of training reads and changes on one process, and how far the run is."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.optim.lr_scheduler import LRScheduler

from deq_lm.cells.memory import Memory
from deq_lm.data.streams import ContiguousStreams
from deq_lm.modeling import DEQLMForCausalLM
from deq_lm.training.distillation import Teacher
from deq_lm.training.faults import Account
from deq_lm.training.tracking import Interval


@dataclass
class Progress:
    """How far a run is, over all processes.

    Attributes:
        step: steps taken, the skipped ones included.
        num_tokens: targets trained on.
        account: of faults.
        num_skipped_in_a_row: steps without an update that directly precede now.
        best_step: of the lowest loss on the validation split; None before the first.
        best_nats_per_token: that loss.
        mean_nats_per_token: running mean of the loss, against which a spike is seen; None before the first step.
        owes_validation: whether a signal broke off the validation of this step, which is then the next thing to do.
    """

    step: int = 0
    num_tokens: int = 0
    account: Account = field(default_factory=Account)
    num_skipped_in_a_row: int = 0
    mean_nats_per_token: float | None = None
    best_step: int | None = None
    best_nats_per_token: float | None = None
    owes_validation: bool = False

    def is_best(self, nats_per_token: float | None) -> bool:
        """Whether the validation loss of this step is the lowest so far, and if so note it; None (not finite) never is."""
        better = nats_per_token is not None and (
            self.best_nats_per_token is None or nats_per_token < self.best_nats_per_token
        )
        if better:
            self.best_step, self.best_nats_per_token = self.step, nats_per_token
        return better


@dataclass
class TrainingState:
    """All that a step reads and changes, on one process; `memory` is of this process's streams, and so is the teacher's.

    The teacher is dropped when it has taught its share of the steps. Its memory reaches back through its layers to text
    that is not read again, so it is kept in checkpoints.
    """

    model: DEQLMForCausalLM
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    streams: ContiguousStreams
    memory: Memory | None = None
    progress: Progress = field(default_factory=Progress)
    interval: Interval = field(default_factory=Interval)
    teacher: Teacher | None = None
    teacher_memory: Memory | None = None

    @property
    def memories(self) -> dict[str, Memory | None]:
        """By the name in a checkpoint."""
        return {"memory": self.memory, "teacher_memory": self.teacher_memory}
