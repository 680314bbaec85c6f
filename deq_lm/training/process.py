"""What the launcher and the operating system tell a run: how many processes were meant, and that it is to stop."""

from __future__ import annotations

import logging
import os
import signal
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)


def warn_of_missing_processes(num_processes: int) -> None:
    """Log a warning if `accelerate launch` was asked for several processes and started one.

    Its simple launcher, which it takes for CPUs, sets an address to meet at but starts a single process and says nothing.
    """
    environment = os.environ
    if num_processes == 1 and "MASTER_PORT" in environment and "WORLD_SIZE" not in environment:
        logger.warning(
            "accelerate launch was asked for several processes but started one; to run several on CPUs: "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N ..."
        )


class StopSignal:
    """Turns the first SIGINT or SIGTERM into a note for the training loop; a second one acts at once, as usual.

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

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
