"""What f must do, checked at every evaluation: keep the shape, and leave older tensors alone."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from deq_lm._types import FixedPointMap
from deq_lm.autocast import Autocast, KnownPrecision
from deq_lm.solvers.norms import spacing


class CheckedMap:
    """f as solvers see it: images in the state's dtype, evaluated under the autocast state of the moment it was wrapped.

    Solvers run with autocast off, since their inner products must not be rounded to half precision.

    Args:
        f: the map.
        device_type: of the state.
        spacing: see `solve`.

    Raises:
        ValueError: if f changes the shape, or writes into its argument or into what it returned before (an output buffer
            used twice makes every residual zero).
    """

    def __init__(self, f: FixedPointMap, device_type: str, *, spacing: float | None = None) -> None:
        self._f, self._given_spacing = f, spacing
        self._autocast = Autocast.current(device_type)
        self._image_dtype: torch.dtype | None = None
        self._last: weakref.ref[Tensor] | None = None

    @property
    def unchecked(self) -> FixedPointMap:
        """f itself, for a solver that needs more of it than its values."""
        return self._f

    def spacing(self, state_dtype: torch.dtype) -> float:
        """Relative spacing of the numbers that f computes with.

        Args:
            state_dtype: stands for that of f's image as long as f has not been evaluated here, as by an operator splitting,
                which evaluates its parts.
        """
        image_dtype = state_dtype if self._image_dtype is None else self._image_dtype
        if self._given_spacing is not None:
            return max(self._given_spacing, spacing(image_dtype))
        return spacing_of(self._f, image_dtype, self._autocast)

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


def spacing_of(f: FixedPointMap, image_dtype: torch.dtype, autocast: Autocast) -> float:
    """Relative spacing of the numbers that f computes with, the coarsest of those it can be seen to compute with.

    Args:
        f: a `KnownPrecision`, such as a bound cell, says what it computes in; of others the rest is all there is to see.
        image_dtype: of what it returns.
        autocast: of where it is called; f's own replaces it.
    """
    dtypes = {image_dtype}
    if isinstance(f, KnownPrecision):
        autocast = f.autocast
        dtypes.add(f.dtype)
    if autocast.enabled:
        dtypes.add(autocast.dtype)
    return max(map(spacing, dtypes))
