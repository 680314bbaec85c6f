"""Distillation: in the first part of a run, the loss also asks for what a finished model predicts."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from deq_lm.cells.memory import Memory
from deq_lm.data.tokenizers import vocabulary_hash
from deq_lm.errors import CheckpointError, ConfigError, DataError
from deq_lm.evaluation.loading import load_model, model_folder
from deq_lm.modeling import DEQLMForCausalLM


@dataclass(frozen=True)
class DistillationConfig:
    """A term of the loss: `weight` times `soft_cross_entropy` against a teacher, per target, beside the nats of the text.

    Attributes:
        teacher: folder of a finished run, or of a saved model, with the vocabulary of this run; for example the unrolled
            twin of an equilibrium.
        weight: of the term; that of the text is 1. > 0.
        temperature: both models' logits are divided by it, > 0; above 1 the term is more about unlikely words.
        until: share of the schedule's steps after which the term is left out, in (0, 1].

    Raises:
        ValueError: if a value is out of range.
    """

    teacher: str
    weight: float
    temperature: float
    until: float

    def __post_init__(self) -> None:
        if not self.teacher.strip():
            raise ValueError("teacher is empty: give the folder of a finished run, or null for the section.")
        if not self.weight > 0:
            raise ValueError(f"weight={self.weight}: expected more than 0, or null for the section: no teacher.")
        if not self.temperature > 0:
            raise ValueError(
                f"temperature={self.temperature}: expected more than 0; 1.0 leaves the logits as they are."
            )
        if not 0 < self.until <= 1:
            raise ValueError(f"until={self.until}: expected a share of the steps in (0, 1], at which it ends.")

    def num_taught_steps(self, num_steps: int) -> int:
        """Of a schedule of so many, from the first on."""
        return round(self.until * num_steps)


@dataclass(frozen=True)
class Teacher:
    """A finished model, frozen and in evaluation mode.

    Attributes:
        config: when it is asked, and how much it counts.
        model: its memory is its own, and carried from segment to segment by whoever asks it.
        sha256: of its weights, by which a resumed run knows it.
    """

    config: DistillationConfig
    model: DEQLMForCausalLM
    sha256: str

    def term(self, logits: Tensor, input_ids: Tensor, memory: Memory | None) -> tuple[Tensor, Memory | None]:
        """The weighted term of a student's logits of a segment, in nats, a sum; and the memory after the segment."""
        with torch.no_grad():
            taught = self.model(input_ids, memory=memory)
        return self.config.weight * soft_cross_entropy(logits, taught.logits, self.config.temperature), taught.memory


def load_teacher(
    config: DistillationConfig | None, tokenizer: PreTrainedTokenizerFast, device: torch.device
) -> Teacher | None:
    """The teacher of a run with this tokenizer, on a device; None, if it has none.

    Raises:
        ConfigError: there is no model in the folder, it cannot be loaded, or its vocabulary is another one.
    """
    if config is None:
        return None
    where = f"training.distillation.teacher={config.teacher}"
    try:
        folder = model_folder(Path(config.teacher))
        model, its_tokenizer = load_model(folder)
    except (CheckpointError, DataError) as error:
        raise ConfigError(f"{where}: {error}") from error
    if vocabulary_hash(its_tokenizer).digest() != vocabulary_hash(tokenizer).digest():
        raise ConfigError(
            f"{where}: has another vocabulary, of {len(its_tokenizer):,} entries where this run has {len(tokenizer):,}, so "
            f"that their predictions cannot be compared. Give data.tokenizer={folder}, or another teacher."
        )
    nn.Module.to(model, device)
    with open(folder / "model.safetensors", "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return Teacher(config, model.requires_grad_(requires_grad=False), sha256)


def soft_cross_entropy(logits: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """-T^2 sum softmax(taught / T) log softmax(logits / T), over words and positions, in nats.

    The factor T^2 leaves the size of the gradient about the same at every temperature. At the teacher's own logits the
    gradient is 0, and the value T^2 times their entropy.

    Args:
        logits: of the student, (..., V).
        taught: of the teacher, likewise.
        temperature: T > 0.

    References:
        Hinton, Vinyals, Dean 2015, "Distilling the knowledge in a neural network", section 2.
    """
    soft = (taught / temperature).softmax(dim=-1)
    return -(temperature**2) * (soft * (logits / temperature).log_softmax(dim=-1)).sum()
