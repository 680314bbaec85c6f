"""How many parameters a model has, and the untied stack that has as many."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from deq_lm.errors import ConfigError
from deq_lm.modeling.configuration_deq_lm import DEQLMConfig, build_config
from deq_lm.modeling.modeling_deq_lm import DEQLMForCausalLM


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model, a tied one counted once.

    Attributes:
        embedding: of the token embedding and the output layer.
        other: of the cells.
    """

    embedding: int
    other: int

    @property
    def total(self) -> int:
        return self.embedding + self.other


def count_parameters(config: DEQLMConfig) -> ParameterCount:
    """Count without allocating any."""
    with torch.device("meta"):
        model = DEQLMForCausalLM(config)
    other = sum(parameter.numel() for parameter in model.model.layers.parameters())
    return ParameterCount(embedding=model.num_parameters() - other, other=other)


def matching_stack(model: Mapping[str, Any], num_layers: int, vocab_size: int) -> dict[str, Any]:
    """The `model` section of the untied stack of `num_layers` layers with as many parameters as a given model.

    It has no injection, and the given model's width, so that the embeddings are the same; its inner width is solved for.
    What else the section says of its cell stays; what it says of a solve goes.

    Args:
        model: the `model` section of a recipe, of a cell that has `d_inner` and `injection`.
        num_layers: of the stack, 1 or more.
        vocab_size: for the embedding, which both have.

    Raises:
        ConfigError: the cell has no inner width to solve for, or no inner width matches within 0.5 %.
    """
    config = build_config(model, vocab_size)
    cell = dict(config.cell or {})
    if not {"d_inner", "injection"} <= cell.keys():
        raise ConfigError(
            f"model.cell.name={cell['name']}: expected a cell with d_inner and injection, to solve for d_inner."
        )

    def stack(d_inner: int) -> dict[str, Any]:
        layer = {**cell, "d_inner": d_inner, "injection": "none", "num_blocks": 1}
        kept = {key: model[key] for key in model if key not in _OF_A_SOLVE}
        return {**kept, "depth": "stack", "num_layers": num_layers, "cell": layer}

    def count(d_inner: int) -> int:
        return count_parameters(build_config(stack(d_inner), vocab_size)).other

    target = count_parameters(config).other
    slope = count(2) - count(1)
    d_inner = max(1, round(1 + (target - count(1)) / slope))
    found = count(d_inner)
    if abs(found - target) > 0.005 * target:
        raise ConfigError(
            f"a stack of {num_layers} layers of width {cell['d_model']} has {found:,} parameters with d_inner={d_inner}; "
            f"{target:,} are wanted, within 0.5 %. Take fewer layers."
        )
    return stack(d_inner)


_OF_A_SOLVE = ("solver", "stopping", "evaluation_stopping", "adjoint", "start")
