"""What a forward pass and `generate` may be given, checked before anything is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from deq_lm.cells.memory import Past


def unknown_id(name: str, ids: Tensor, vocab_size: int) -> ValueError:
    """The error that names the first id outside the vocabulary, of which there is one."""
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    return ValueError(
        f"{name} have {int(outside[0])}: expected ids from 0 to {vocab_size - 1}, the model's vocabulary. Take the "
        "tokenizer that was saved with it."
    )


def mask_of_new(attention_mask: Tensor | None, input_ids: Tensor, num_past: int) -> Tensor | None:
    """The mask of `input_ids` alone, of one that may be of the `num_past` tokens before them, too.

    Raises:
        ValueError: it is of neither length.
    """
    if attention_mask is None:
        return None
    length = input_ids.shape[1]
    if attention_mask.shape[1] not in (length, num_past + length):
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)} with {length} tokens after {num_past}: expected a "
            "value for each of the new ones, or for each of all."
        )
    return attention_mask[:, -length:]


def check_inputs(input_ids: Tensor, attention_mask: Tensor | None, memory: Past | None) -> None:
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
        given = f"a tensor of {input_ids.dtype}" if isinstance(input_ids, Tensor) else f"a {type(input_ids).__name__}"
        raise ValueError(
            f"input_ids are {given}: expected a tensor of torch.int64; make one by torch.tensor(ids)[None]."
        )
    shape = tuple(input_ids.shape)
    if input_ids.dim() != 2 or 0 in shape:
        raise ValueError(
            f"input_ids of shape {shape}: expected (B, L), at least one token; give one sequence as input_ids[None], and "
            "begin an empty text with the end-of-document token."
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)} with input_ids of shape {shape}: expected the same "
            "shape, one value a token of this segment; memory brings its own mask."
        )
    if memory is not None and memory.num_sequences != shape[0]:
        raise ValueError(
            f"memory of {memory.num_sequences} sequences with input_ids of shape {shape}: expected one for each. Start "
            "with memory=None when the streams change; generate with several beams or returned sequences takes no memory."
        )
