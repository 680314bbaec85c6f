"""How strongly a language model's cell contracts where it is solved: the spectral radius of df/dz on a little text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deq_lm.cells import BoundCell
from deq_lm.equilibrium import Equilibrium
from deq_lm.evaluation.config import EvaluationConfig
from deq_lm.evaluation.modes import device_of, measuring, seeded
from deq_lm.evaluation.token_loss import finite
from deq_lm.modeling import DEQLMForCausalLM
from deq_lm.regularizers import spectral_radius

NUM_SEQUENCES = 4
NUM_PRODUCTS = 30
"""Vector-Jacobian products, about as many as a backward pass of training takes: enough to see a trend."""


def largest_spectral_radius(
    model: DEQLMForCausalLM, tokens: np.ndarray, config: EvaluationConfig, *, seed: int = 0
) -> float | None:
    """The largest of a few sequences' spectral radii at the equilibrium; above 1, plain iteration does not converge there.

    Args:
        model: an equilibrium; left as it was found.
        tokens: 1-D; the sequences are taken from all over it, each with the segment before it as memory.
        config: its segment_length.
        seed: of the vectors that the iteration starts from.

    Returns:
        None where it is not finite, or the text is shorter than two tokens.
    """
    layers, device = model.model.layers, device_of(model)
    assert isinstance(layers, Equilibrium)
    length = min(config.segment_length, len(tokens) // 2)
    if length == 0:
        return None
    starts = np.linspace(0, len(tokens) - 2 * length, NUM_SEQUENCES).astype(np.int64)
    text = torch.from_numpy(np.stack([tokens[start : start + 2 * length] for start in starts]).astype(np.int64)).to(
        device
    )
    with measuring(model), seeded(seed, device):
        memory = model(text[:, :length], return_logits=False).memory
        with noted_bindings(layers) as bindings:
            solution = model(text[:, length:], memory=memory, return_logits=False).solution
        ((f, _),) = bindings
        return finite(spectral_radius(f, solution.z, num_iterations=NUM_PRODUCTS).max().item())


@contextmanager
def noted_bindings(layers: Equilibrium) -> Iterator[list[tuple[BoundCell, Tensor]]]:
    """Inside, what the cell is bound to is noted: f, and the input it was bound to."""
    noted: list[tuple[BoundCell, Tensor]] = []
    bind = layers.cell.bind

    def note(x: Tensor, *arguments: Any, **options: Any) -> BoundCell:
        f = bind(x, *arguments, **options)
        noted.append((f, x))
        return f

    layers.cell.bind = note
    try:
        yield noted
    finally:
        del layers.cell.bind
