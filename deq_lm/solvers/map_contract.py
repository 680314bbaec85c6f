"""What f must do, checked at every evaluation: keep the shape, and leave older tensors alone."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from deq_lm._types import FixedPointMap
from deq_lm.autocast import Autocast
from deq_lm.solvers.norms import spacing


class CheckedMap:
    """f as solvers see it: images in the state's dtype, evaluated under the autocast state of the moment it was wrapped.

    Solvers run with autocast off, since their inner products must not be rounded to half precision.

    Raises:
        ValueError: if f changes the shape, or writes into its argument or into what it returned before (an output buffer
            used twice makes every residual zero).
    """

    def __init__(self, f: FixedPointMap, device_type: str) -> None:
        self._f = f
        self._autocast = Autocast.current(device_type)
        self._image_dtype = torch.float64
        self._last: weakref.ref[Tensor] | None = None

    @property
    def unchecked(self) -> FixedPointMap:
        """f itself, for a solver that needs more of it than its values."""
        return self._f

    @property
    def spacing(self) -> float:
        """Relative spacing of the numbers that f computes with: those of its image, of the dtype it says it computes in, or
        of autocast, its own or the caller's, whichever is coarsest; or of its image and what it says itself (`f.spacing`).
        Known after the first evaluation."""
        own = getattr(self._f, "spacing", None)
        if own is not None:
            return max(own, spacing(self._image_dtype))
        autocast = getattr(self._f, "autocast", self._autocast)
        dtypes = {self._image_dtype, getattr(self._f, "dtype", self._image_dtype)}
        return max(map(spacing, dtypes | ({autocast.dtype} if autocast.enabled else set())))

    def __call__(self, z: Tensor) -> Tensor:
        last = None if self._last is None else self._last()
        watched = [tensor for tensor in (z, last) if tensor is not None and not tensor.is_inference()]
        versions = [tensor._version for tensor in watched]
        with self._autocast.enter():
            image = self._f(z)
        if image.shape != z.shape:
            raise ValueError(
                f"f maps a state of shape {tuple(z.shape)} to {tuple(image.shape)}; a fixed point needs the same shape."
            )
        if versions != [tensor._version for tensor in watched]:
            raise ValueError(
                "f writes into its argument or into a tensor it returned before; return a new tensor from every call."
            )
        self._image_dtype = image.dtype
        image = image.to(z.dtype)
        self._last = weakref.ref(image)
        return image
