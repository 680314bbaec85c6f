"""What generation keeps of a text, as transformers' `generate` handles it: the past at equilibrium, and what it cost.

At the equilibrium no position depends on later ones, so that what a cell computes of past positions (keys and values, say)
stays as it is when the text grows, and a new token is a solve over its own position alone.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from deq_lm.cells.memory import ProjectedMemory
from deq_lm.equilibrium import SegmentOutput


class PastLayer(CacheLayerMixin):
    """The library's cache layer around a `ProjectedMemory`.

    Attributes:
        memory: what the next tokens attend to; None before the first.
        start: where the next solve begins, (B, 1, ...): at f(z*) of the last position, if it is to warm-start; else None.
        num_evaluations: of f, by position of the whole text, (B, T) int32; None likewise.
        ids: the text, (B, T) int64, those that have left the window included; None likewise.
    """

    is_sliding = True
    is_croppable = False
    supports_early_init = False

    def __init__(self, *, warm_start: bool) -> None:
        super().__init__()
        self.warm_start = warm_start
        self.reset()

    def reset(self) -> None:
        """Forget the text."""
        self.memory: ProjectedMemory | None = None
        self.start: Tensor | None = None
        self.num_evaluations: Tensor | None = None
        self.ids: Tensor | None = None

    def get_seq_length(self) -> int:
        return 0 if self.ids is None else self.ids.shape[1]

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in older versions of the library

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        past = 0 if self.memory is None else self.memory.length
        return past + query_length, self.get_seq_length() - past

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.memory is not None:
            indices = torch.arange(self.memory.num_sequences, device=self.memory.features.device)
            self.batch_select_indices(indices.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.memory is not None:
            indices = indices.to(self.memory.features.device)
            self.memory = self.memory.select(indices)
            for name in ("ids", "start", "num_evaluations"):
                kept = getattr(self, name)
                setattr(self, name, None if kept is None else kept[indices])

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest tokens, as many as -`tokens_to_remove` says.

        Raises:
            ValueError: for a positive number; where tokens have left the window, which would have to come back.
        """
        number = -tokens_to_remove
        if not 0 <= number <= self.get_seq_length():
            raise ValueError(
                f"crop({tokens_to_remove}): expected minus the number of tokens to take back, of {self.get_seq_length()}."
            )
        if number == 0:
            return
        if self.memory is None or self.ids is None or self.memory.length < self.get_seq_length():
            raise ValueError(
                f"crop({tokens_to_remove}): positions before the window are not kept and cannot come back into it. Decode "
                "without an assistant, or keep text and continuation within the model's mem_len."
            )
        self.memory = self.memory.without_newest(number)
        self.ids = self.ids[:, :-number]
        self.start = None  # of a token that is gone
        if self.num_evaluations is not None:
            self.num_evaluations = self.num_evaluations[:, :-number]

    def append(self, input_ids: Tensor, segment: SegmentOutput) -> None:
        """Take new tokens, (B, L) int64, and what a forward pass over them has given."""
        self.memory = segment.past
        self.ids = input_ids if self.ids is None else torch.cat([self.ids, input_ids], dim=1)
        if segment.solution is not None:
            if self.warm_start:
                self.start = segment.solution.image[:, -1:]
            new = segment.solution.position_num_evaluations
            self.num_evaluations = (
                new if self.num_evaluations is None else torch.cat([self.num_evaluations, new], dim=1)
            )

    def update(self, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError("an EquilibriumCache is written by the model, once a solve")

    lazy_initialization = update


class EquilibriumCache(Cache):
    """The `past_key_values` of `DEQLMForCausalLM`; a plain `generate` makes its own.

    Give `generate(past_key_values=cache, ...)` one to look into while it writes, or to continue a text with. It belongs to
    one text, and to the weights that it was made with.

    Args:
        warm_start: begin every solve at f(z*) of the position before, instead of where it begins in training: at zero, or
            at the model's learned start. Where it was measured (eval/results/generation.json, from zero) it saves next to
            nothing, so that it is off.
    """

    def __init__(self, *, warm_start: bool = False) -> None:
        super().__init__(layers=[PastLayer(warm_start=warm_start)])

    @property
    def layer(self) -> PastLayer:
        """The one layer: an equilibrium has no other, and a stack's are side by side in it."""
        (layer,) = self.layers
        assert isinstance(layer, PastLayer)
        return layer

    @property
    def num_evaluations(self) -> Tensor | None:
        """Evaluations of the cell that each position took, (B, T) int32; None before the first or without a solve."""
        return self.layer.num_evaluations

    def check_text(self, input_ids: Tensor) -> None:
        """Raises ValueError unless the text of the cache goes on in `input_ids`, (B, T) int64, which begin with it."""
        seen = self.layer.ids
        if seen is None:
            return
        length = seen.shape[1]
        begins = input_ids[:, :length].to(seen.device)
        if input_ids.shape[1] <= length or len(input_ids) != len(seen) or (begins != seen).any():
            raise ValueError(
                f"input_ids of shape {tuple(input_ids.shape)} with past_key_values that have seen {length} tokens of "
                f"{len(seen)} sequences: expected those and at least one more. Begin another text with a new cache."
            )


def check_cache(cache: Any, depth: str) -> None:
    """Raises ValueError for a cache of another kind, or in a model that cannot have one."""
    if cache is None:
        return
    if not isinstance(cache, EquilibriumCache):
        raise ValueError(f"past_key_values of type {type(cache).__name__}: expected an EquilibriumCache, or none.")
    if depth == "unrolled":
        raise ValueError(
            "use_cache with depth=unrolled: every layer has its own past, of which no equilibrium can be kept. Give "
            "generate use_cache=False, or leave it out."
        )
