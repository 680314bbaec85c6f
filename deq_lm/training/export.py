"""Models, tensors and pickles written to disk, where whatever the disk refuses is an OSError.

Each library has an error of its own for a full disk: safetensors SafetensorError, tokenizers plain Exception, PyTorch
RuntimeError.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from deq_lm.data.tokenizers import save_tokenizer
from deq_lm.modeling import DEQLMForCausalLM


def save_model(folder: Path, model: DEQLMForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Put a model and its tokenizer into `folder`, as `from_pretrained` and `load_tokenizer` read them."""
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:
        raise OSError(f"model.safetensors: {error}") from error
    save_tokenizer(tokenizer, folder)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file."""
    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from error


def save_pickle(path: Path, content: Any) -> None:
    """Write what `torch.load(weights_only=True)` reads."""
    try:
        torch.save(content, path)
    except RuntimeError as error:  # what PyTorch's own writer raises on a full disk
        reason = str(error).partition("\n")[0]
        raise OSError(f"{path.name}: PyTorch could not write it, as on a full disk: {reason}") from error
