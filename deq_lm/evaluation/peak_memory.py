"""What a training step keeps in memory, counted on any device: bytes saved for backward, and the peak of live tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from deq_lm.cells.memory import Memory
from deq_lm.evaluation.live_bytes import LiveBytes
from deq_lm.evaluation.modes import device_of, measuring, seeded
from deq_lm.modeling import DEQLMForCausalLM
from deq_lm.solvers import StoppingRule


@dataclass(frozen=True, kw_only=True)
class MemoryRow:
    """One training step at one depth, as an equilibrium and as the unrolled network of the same weights.

    Attributes:
        depth: evaluations of the cell.
        equilibrium_bytes: saved for backward, of a solve with this budget and its adjoint.
        unrolled_bytes: saved for backward, of as many layers.
        equilibrium_peak_bytes: most bytes of tensors alive at once, with the solvers' own histories.
        unrolled_peak_bytes: likewise.
    """

    depth: int
    equilibrium_bytes: int
    unrolled_bytes: int
    equilibrium_peak_bytes: int
    unrolled_peak_bytes: int


def saved_bytes(run: Callable[[], Any], *, besides: Iterable[Tensor] = ()) -> int:
    """Bytes of the different storages that autograd saves for backward while `run` runs.

    What is recorded inside a backward pass that `run` makes counts too: an implicit adjoint records its one evaluation
    there. What was saved is held until the end, so that no address is counted for two storages.

    Args:
        run: a forward pass, or a whole training step.
        besides: tensors whose storages do not count: parameters and inputs, which are there without a gradient as well.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in besides}
    saved: dict[int, UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage
        return tensor.detach()  # an output saved by its own node must not keep that node alive

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in saved.values())


def peak_live_bytes(run: Callable[[], Any]) -> int:
    """Largest sum of the bytes of tensors made by `run` and alive at the same time.

    Tensors only: not what a kernel uses inside, nor what an allocator keeps in reserve.
    """
    meter = LiveBytes()
    with meter:
        run()
    return meter.peak


def memory_against_depth(
    model: DEQLMForCausalLM, input_ids: Tensor, depths: Sequence[int], *, memory: Memory | None = None
) -> list[MemoryRow]:
    """Memory of one training step, forward and backward, up to the hidden states, against the number of evaluations.

    The output layer is left out; it is the same in both. Parameters, their gradients, token ids and the memory of earlier
    segments do not count as saved. The equilibrium runs its whole budget, whatever its residual.

    Args:
        model: with `depth="equilibrium"`; left as it was found, gradients included.
        input_ids: (B, L) int64, on the model's device.
        depths: numbers of evaluations.
        memory: of the segment before.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    present = [*model.parameters(), *model.buffers(), input_ids]
    present += [] if memory is None else [memory.z, memory.x]
    base = model.model

    def step(**depth: Any) -> Callable[[], Any]:
        def run() -> None:
            output = base(input_ids, memory=memory, **depth).last_hidden_state
            torch.autograd.grad(output, parameters, torch.ones_like(output), allow_unused=True)

        return run

    rows = []
    with measuring(model, training=True), seeded(0, device_of(model)):
        for depth in depths:
            equilibrium, unrolled = step(stopping=StoppingRule.fixed(depth - 1)), step(num_unrolled_steps=depth)
            rows.append(
                MemoryRow(
                    depth=depth,
                    equilibrium_bytes=saved_bytes(equilibrium, besides=present),
                    unrolled_bytes=saved_bytes(unrolled, besides=present),
                    equilibrium_peak_bytes=peak_live_bytes(equilibrium),
                    unrolled_peak_bytes=peak_live_bytes(unrolled),
                )
            )
    return rows
