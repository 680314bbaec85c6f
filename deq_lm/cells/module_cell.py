"""Any torch module f(z, x) as a cell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from deq_lm.autocast import Autocast
from deq_lm.cells.base import BoundCell, Cell, CellConfig
from deq_lm.cells.memory import Past

X = "x"
PREFIX = "module."  # of the names of what the module owns, so that none is called x


class ModuleCell(Cell):
    """f(z, x) = module(z, x), for x of any shape (B, ...) and a state of the same shape.

    `Equilibrium` makes one of a module that is no cell. The module is called with copies of its buffers, and with the same
    random numbers in every evaluation of a solve, the backward pass's included: one dropout mask a solve. It must act on
    each sequence of the batch by itself, must not change its buffers, and stays in its mode until the backward pass.

    Nothing is known of a module's causality, so its state counts as one position, (B, 1, ...), which is solved as a whole.
    That is right for any module; but of a causal one, an unconverged solve then depends on later positions. `causal`
    states that the second axis is time and that position t of f depends on positions up to t: prefixes are then solved as
    such. Of a module that is not causal, positions that count as solved would be changed by later ones.
    """

    def __init__(self, module: nn.Module, *, causal: bool = False) -> None:
        super().__init__(CellConfig(mem_len=0))
        self.module = module
        self.causal = causal

    def reset_parameters(self) -> None:
        """By the `reset_parameters` of every submodule that has one, as torch's own do."""
        for module in self.module.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()

    def as_state(self, x: Tensor) -> Tensor:
        return x if self.causal else x[:, None]

    def read_out(self, z: Tensor) -> Tensor:
        return z if self.causal else z[:, 0]

    def bind(
        self, x: Tensor, memory: Past | None = None, key_mask: Tensor | None = None, *, sliding: bool = False
    ) -> BoundCell:
        """Raises ValueError for memory, padding, or a module that mixes the sequences of a batch."""
        if memory is not None or key_mask is not None:
            given = "memory" if memory is not None else "key_mask"
            raise ValueError(
                f"{given} with {type(self.module).__name__}: a plain module f(z, x) knows of neither memory nor padding. "
                "Put what it needs into x, or write a Cell."
            )
        self._refuse_batch_statistics()
        owned = dict(self.module.named_parameters())
        owned |= {name: buffer.detach().clone() for name, buffer in self.module.named_buffers()}
        tensors = {X: x, **{PREFIX + name: tensor for name, tensor in owned.items()}}
        evaluate = _Evaluation(self.module, seed=int(torch.randint(2**63 - 1, ())), num_sequences=len(x))
        return BoundCell(evaluate, tensors, {X: 0}, x.dtype, Autocast.current(x.device.type))

    def _refuse_batch_statistics(self) -> None:
        for name, module in self.module.named_modules():
            if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
                raise ValueError(
                    f"{type(module).__name__} ({name or 'the module itself'}) with the statistics of the batch: they make "
                    "each sequence's equilibrium depend on the others, and change with every evaluation. Use GroupNorm or "
                    "LayerNorm, or its running statistics, by eval()."
                )


@dataclass(frozen=True)
class _Evaluation:
    """f(z) of a module that reads `tensors` instead of what it owns.

    Attributes:
        module: in the mode it was bound in.
        seed: of the random numbers of every evaluation.
        num_sequences: it was bound for.
    """

    module: nn.Module
    seed: int
    num_sequences: int

    def __call__(self, z: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        x = tensors[X]
        owned = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name != X}
        before = {name: _version(tensor) for name, tensor in owned.items()}
        used = dict(owned)  # gets what the module assigns
        with _repeating(self.seed, x.device) as generator:
            start = generator.get_state()
            image = functional_call(self.module, used, (z.reshape(x.shape), x))
            draws = not torch.equal(start, generator.get_state())
        if not isinstance(image, Tensor) or image.shape != x.shape:
            shown = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(
                f"{type(self.module).__name__} maps z and x of shape {tuple(x.shape)} to {shown}; a fixed point needs the "
                "same shape. Project x to the state's shape before."
            )
        if draws and len(x) != self.num_sequences:
            raise ValueError(
                f"{type(self.module).__name__} draws random numbers, and here for a part of the batch, as "
                "estimate_jacobian does: they are not those of the solve. Apply dropout to x instead, or put it into "
                "eval()."
            )
        changed = [name for name in owned if used[name] is not owned[name] or _version(owned[name]) != before[name]]
        if changed:
            raise ValueError(
                f"{type(self.module).__name__} changes {', '.join(changed)} when it is called: f would be another map in "
                "every evaluation, and have no fixed point. Use a module that keeps no running state, or put it into "
                "eval()."
            )
        return image.reshape(z.shape)


@contextmanager
def _repeating(seed: int, device: torch.device) -> Iterator[torch.Generator]:
    """Inside, the device's random numbers start from `seed`; afterwards they go on as before."""
    generator = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield generator
    finally:
        generator.set_state(state)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
