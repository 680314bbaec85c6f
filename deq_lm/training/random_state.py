"""The random generators that a step may draw from, as numbers for JSON and tensors for safetensors."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_state_of_all() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The state of every generator a step may draw from: numbers for JSON, tensors for safetensors."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - the global one is meant
    tensors = {"random.torch": torch.get_rng_state(), "random.numpy": torch.from_numpy(np.array(keys))}
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [kind, position, has_gauss, cached],
    }, tensors


def try_random_state(numbers: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raises what `set_random_state` would, and sets nothing."""
    version, internal, gauss = numbers["python"]
    random.Random().setstate((version, tuple(internal), gauss))  # noqa: S311
    kind, *rest = numbers["numpy"]
    np.random.RandomState().set_state((kind, tensors["random.numpy"].numpy(), *rest))
    torch.Generator().set_state(tensors["random.torch"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.Generator("cuda").set_state(tensors["random.cuda"])


def set_random_state(numbers: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Put all generators where `random_state_of_all` found them."""
    version, internal, gauss = numbers["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, *rest = numbers["numpy"]
    np.random.set_state((kind, tensors["random.numpy"].numpy(), *rest))  # noqa: NPY002
    torch.set_rng_state(tensors["random.torch"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
