"""The maps that solvers are timed on: a trained cell, the same with random weights, and a cheap contraction."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from deq_lm.cells.base import BoundCell, Cell
from deq_lm.cells.transformer_xl import TransformerXLCell
from deq_lm.data.encoding import prepare
from deq_lm.equilibrium import Equilibrium
from deq_lm.errors import CheckpointError, DataError
from deq_lm.evaluation.loading import load_model, model_folder
from deq_lm.modeling import DEQLMForCausalLM
from deq_lm.training.recipe import load_recipe

BATCH, LENGTH = 8, 128
"""Sequences and positions of every benchmark that does not say otherwise."""


def load_benchmark_model(run: Path, device: torch.device) -> DEQLMForCausalLM:
    """The model of a finished run.

    Raises:
        CheckpointError: there is none; says what makes one.
    """
    try:
        model, _ = load_model(model_folder(run))
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} The benchmarks run on a trained cell: scripts/train_lm.py recipes/benchmark_cell.yaml makes it."
        ) from error
    return model.to(device)  # pyright: ignore[reportArgumentType]  (the library's signature)


def token_ids(run: Path, device: torch.device, *, length: int = LENGTH) -> Tensor:
    """The first tokens of the test split of the run's corpus, cut into streams: (BATCH, length) int64.

    Raises:
        DataError: it has fewer.
    """
    tokens = prepare(load_recipe(run / "recipe.yaml").data).splits["test"].tokens
    if len(tokens) < BATCH * length:
        raise DataError(
            f"{run}: its test split has {len(tokens):,} tokens, and {BATCH} streams of {length:,} are {BATCH * length:,}. "
            "Ask for fewer, or give a run on a longer text."
        )
    return torch.as_tensor(tokens[: BATCH * length].astype("int64"), device=device).view(BATCH, length)


def embed(model: DEQLMForCausalLM, input_ids: Tensor) -> Tensor:
    """The cell's input for token ids, (B, L, D)."""
    return (model.model.embed_tokens(input_ids) * model.config.d_model**0.5).detach()


def cell_of(model: DEQLMForCausalLM) -> Cell:
    """The cell of an equilibrium model."""
    assert isinstance(model.model.layers, Equilibrium), f"a model of depth {model.config.depth} solves nothing"
    return model.model.layers.cell


def trained_cell(model: DEQLMForCausalLM, input_ids: Tensor) -> BoundCell:
    with torch.no_grad():
        return cell_of(model).bind(embed(model, input_ids))


def random_cell(model: DEQLMForCausalLM, input_ids: Tensor, *, seed: int = 0) -> BoundCell:
    """The trained cell's shape with fresh weights, bound to the same input."""
    torch.manual_seed(seed)
    trained = cell_of(model)
    assert isinstance(trained, TransformerXLCell)
    with torch.no_grad():
        return TransformerXLCell(trained.config).to(input_ids.device).eval().bind(embed(model, input_ids))


class Contraction:
    """f(z) = tanh(z W + x), ||W|| = norm: an evaluation that costs one matrix product."""

    def __init__(self, x: Tensor, *, norm: float = 0.9, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        width = x.shape[-1]
        weight = torch.randn(width, width, generator=generator)
        self.weight = (norm * weight / torch.linalg.matrix_norm(weight, 2)).to(x)
        self.x = x

    def __call__(self, z: Tensor) -> Tensor:
        return torch.tanh(z @ self.weight + self.x)
