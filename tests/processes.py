"""Processes for tests of several: forked from this one, joined by gloo, and killed if they take too long."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch.multiprocessing
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, PrepareForLaunch, patch_environment


def launch(function: Callable[..., None], *arguments: Any, num_processes: int = 2, seconds: float = 180) -> None:
    """`accelerate.debug_launcher` with an end: run `function(*arguments)` in each process.

    Raises:
        TimeoutError: they have not ended in time, as after a deadlock; all are killed.
        ProcessRaisedException: one failed.
    """
    with (
        tempfile.NamedTemporaryFile() as rendezvous,
        patch_environment(
            world_size=num_processes,
            master_addr="127.0.0.1",
            master_port="29500",
            accelerate_mixed_precision="no",
            accelerate_debug_rdv_file=rendezvous.name,
            accelerate_use_cpu="yes",
            gloo_socket_ifname="lo",
            cuda_visible_devices="",  # sharding would take the GPUs that it sees
        ),
    ):
        context = torch.multiprocessing.start_processes(
            PrepareForLaunch(function, debug=True),
            args=arguments,
            nprocs=num_processes,
            start_method="fork",
            join=False,
        )
        assert context is not None
        end = time.monotonic() + seconds
        while not context.join(timeout=max(0.1, min(5, end - time.monotonic()))):
            if time.monotonic() > end:
                for process in context.processes:
                    os.kill(process.pid, 9)
                raise TimeoutError(f"{num_processes} processes have not ended after {seconds} s")


class ShardingAccelerator(Accelerator):
    """What `accelerate launch` with recipes/accelerate/gpu_8_fsdp2.yaml gives, on CPUs.

    Accelerate refuses FSDP where there is no accelerator, PyTorch does not. All but that refusal is the real thing.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            reshard_after_forward=False,
            auto_wrap_policy="transformer_based_wrap",
            cpu_ram_efficient_loading=False,
        )
        if self.mixed_precision != "no":
            self.state.fsdp_plugin.set_mixed_precision(self.mixed_precision)
        self.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = (
            DistributedType.FSDP
        )  # from which every AcceleratorState() copies
