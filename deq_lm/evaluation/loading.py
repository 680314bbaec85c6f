"""Load a saved model to measure it: all of its weights, or an error of one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as library_logging

from deq_lm.data.tokenizers import load_tokenizer, vocabulary_hash
from deq_lm.errors import CheckpointError
from deq_lm.modeling import DEQLMConfig, DEQLMForCausalLM


def model_folder(path: Path) -> Path:
    """The folder with the model: `path` itself, or `final` in a run folder.

    Raises:
        CheckpointError: there is no model.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder. Give a run folder, its final/ or one of its checkpoints/.")
    for folder in (path, path / "final"):
        if (folder / "config.json").is_file():
            return folder
    hint = (
        f"give one of {path / 'checkpoints'}/" if (path / "checkpoints").is_dir() else "give a run or checkpoint folder"
    )
    raise CheckpointError(
        f"{path}: holds no model: no config.json, and no final/, which the end of a run writes; {hint}."
    )


def load_model(folder: Path) -> tuple[DEQLMForCausalLM, PreTrainedTokenizerFast]:
    """The model, in float32 and evaluation mode on the CPU, and the tokenizer saved beside it.

    Raises:
        CheckpointError: files are missing, damaged or of another kind, weights are missing, left over or of another
            size, or the vocabularies differ.
        DataError: there is no tokenizer, or it cannot be read.
    """
    if not (folder / "model.safetensors").is_file():
        raise CheckpointError(f"{folder}: no model.safetensors there. Give a folder that save_pretrained wrote.")
    tokenizer = load_tokenizer(folder)
    verbosity, shows_progress = library_logging.get_verbosity(), library_logging.is_progress_bar_enabled()
    library_logging.set_verbosity_error()  # what it would only warn of is an error below
    library_logging.disable_progress_bar()
    try:
        model_type = json.loads((folder / "config.json").read_text("utf-8"))["model_type"]
        if model_type != DEQLMConfig.model_type:
            raise ValueError(f"it is of type {model_type}, not {DEQLMConfig.model_type}")
        loaded: Any = DEQLMForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # they are in the report, and an error below
            output_loading_info=True,
        )
    except Exception as error:  # config.json and the weights can be wrong in many ways, each with its own type
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{folder}: the model cannot be loaded ({reason}). Take a copy of it, or another."
        ) from error
    finally:
        library_logging.set_verbosity(verbosity)
        if shows_progress:
            library_logging.enable_progress_bar()
    model, report = loaded
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            names = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in report[problem])
            shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            raise CheckpointError(
                f"{folder}: config.json and model.safetensors do not belong together: {problem.replace('_', ' ')} {shown}. "
                "Take another checkpoint."
            )
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise CheckpointError(f"{folder}: {name} has values that are not finite. Take another checkpoint.")
    if len(tokenizer) != model.config.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {len(tokenizer)} entries and the model {model.config.vocab_size}; they do not "
            "belong together. Take another checkpoint."
        )
    if model.config.vocabulary_sha256 not in (None, vocabulary_hash(tokenizer).hexdigest()):
        raise CheckpointError(
            f"{folder}: the tokenizer has other entries than that of the model's training; they do not belong together. "
            "Put the tokenizer that was saved with the model there, or take another checkpoint."
        )
    return model.eval(), tokenizer
