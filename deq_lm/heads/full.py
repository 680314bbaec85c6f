"""One vector of full width for every word, in the input and in the output."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from deq_lm.heads.base import EmbeddingConfig, Head
from deq_lm.heads.linear import LinearHead


@dataclass(frozen=True, kw_only=True)
class FullEmbeddingConfig(EmbeddingConfig):
    """A table (V, D) and the linear head; nothing to set."""

    def check(self, vocab_size: int, d_model: int, *, tied: bool) -> None:
        pass  # fits any model

    def make_embedding(self, vocab_size: int, d_model: int, *, init_std: float) -> nn.Module:
        return nn.Embedding(vocab_size, d_model)  # drawn by the model, as any nn.Embedding

    def make_head(self, vocab_size: int, d_model: int, *, init_std: float) -> Head:
        return LinearHead(vocab_size, d_model)
