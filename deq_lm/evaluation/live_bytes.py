"""LiveBytes: the bytes of the tensors alive, on any device, by what they are for, and their peak."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Part = Literal["activations", "solver", "output_layer", "gradients", "embedding", "rest"]
"""What a tensor is for.

activations: made by a cell, an embedding or a backward pass while autograd records, so kept for a backward pass or
    recomputed in one.
solver: made by a solver: its states and what it remembers of them.
output_layer: made by the output layer: hidden states cut to chunks, logits, their losses.
gradients: as the caller says by `LiveBytes.mark`.
embedding: of the shape of an embedding table, as the caller says: its gradients, and what becomes of them.
rest: temporaries of evaluations and backward passes, of the optimizer's step, of clipping.
"""

_PACKAGE = str(Path(__file__).resolve().parents[1]) + "/"
_PART_OF_FOLDER: Mapping[str, Part] = {"solvers": "solver", "heads": "output_layer"}


class LiveBytes(TorchDispatchMode):
    """Counts a storage from the operation that made it until it is freed; those of before do not count.

    Whose it is follows from the innermost function of this package that the operation was called from. Tensors only: not
    what a kernel uses inside, nor what an allocator keeps in reserve.

    Attributes:
        largest: the largest sum of bytes alive at the same time.
        peak: the largest sum without the embedding's.
        parts_at_peak: what was alive then, the embedding's included.
        most: the largest sum of each part, each at its own time.
    """

    def __init__(self, *, embedding_shapes: Collection[tuple[int, ...]] = (), limit_bytes: int | None = None) -> None:
        """
        Args:
            embedding_shapes: what has one of them counts as embedding, and not to the peak.
            limit_bytes: an operation that takes the sum of all above it raises `torch.OutOfMemoryError`; None is no limit.
        """
        super().__init__()
        self._embedding_shapes, self._limit_bytes = frozenset(embedding_shapes), limit_bytes
        self.largest = 0
        self.peak = 0
        self.parts_at_peak: Counter[Part] = Counter()
        self.most: Counter[Part] = Counter()
        self._live: Counter[Part] = Counter()
        self._storages: weakref.WeakKeyDictionary[UntypedStorage, _Held | None] = weakref.WeakKeyDictionary()

    def mark(self, tensor: Tensor, part: Part) -> None:
        """Count the storage of `tensor` under `part` from now on; one of before still does not count."""
        held = self._storages.get(tensor.untyped_storage())
        if held is not None:
            self._live[held.part] -= held.num_bytes
            held.part = part
            self._live[held.part] += held.num_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            self._storages.setdefault(tensor.untyped_storage(), None)  # one of before; a view of it is nothing new
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage not in self._storages:
                part: Part = "embedding" if tuple(tensor.shape) in self._embedding_shapes else _part()
                self._storages[storage] = held = _Held(part, storage.nbytes())
                self._live[held.part] += held.num_bytes
                self.most[held.part] = max(self.most[held.part], self._live[held.part])
                weakref.finalize(storage, self._free, held)
        total = self._live.total()
        self.largest = max(self.largest, total)
        if (peak := total - self._live["embedding"]) > self.peak:
            self.peak, self.parts_at_peak = peak, self._live.copy()
        if self._limit_bytes is not None and total > self._limit_bytes:
            raise torch.OutOfMemoryError(f"{total:,} bytes of tensors are alive; the limit is {self._limit_bytes:,}.")
        return result

    def _free(self, held: _Held) -> None:
        self._live[held.part] -= held.num_bytes


@dataclass
class _Held:
    """What is known of a storage that is alive."""

    part: Part
    num_bytes: int


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _part() -> Part:
    """Of a tensor made now, by the innermost function of the package, this folder left out.

    Without one it is nobody's in particular: on a GPU, autograd runs the operations of a backward pass in a thread of its
    own, where no function is.
    """
    recorded: Part = "activations" if torch.is_grad_enabled() else "rest"
    frame = sys._getframe()
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_PACKAGE):
            folder = file.removeprefix(_PACKAGE).partition("/")[0]
            if folder != Path(__file__).parent.name:
                return _PART_OF_FOLDER.get(folder, recorded)
        frame = frame.f_back
    return recorded
