"""Adaptive embedding and adaptive softmax, tied: wide vectors for frequent words, narrow ones for rare words."""

from __future__ import annotations

from dataclasses import dataclass
from warnings import warn

from torch import nn

from deq_lm.errors import UnusedSettingWarning
from deq_lm.heads.adaptive_embedding import AdaptiveEmbedding
from deq_lm.heads.adaptive_softmax import AdaptiveSoftmax
from deq_lm.heads.base import EmbeddingConfig, Head
from deq_lm.heads.clusters import Clusters


@dataclass(frozen=True, kw_only=True)
class AdaptiveEmbeddingConfig(EmbeddingConfig):
    """What an `adaptive` section says. Transformer-XL and the DEQ papers have, for the 267,735 words of WikiText-103,
    cutoffs [20000, 40000, 200000] and div_val 4.

    Attributes:
        cutoffs: the first id of each tail cluster, rising; ids have to rise as frequencies fall.
        div_val: what divides the width of the embeddings from one cluster to the next, 1 or more.
        d_embed: width of the embeddings of the first cluster; null is d_model.
        tie_first_projection: whether the output uses the projection of the input's first cluster, too; it always uses its
            tables and other projections.
    """

    cutoffs: tuple[int, ...]
    div_val: int = 4
    d_embed: int | None = None
    tie_first_projection: bool = False

    def check(self, vocab_size: int, d_model: int, *, tied: bool) -> None:
        clusters = self._clusters(vocab_size, d_model)
        if not tied:
            raise ValueError(
                "adaptive with tie_word_embeddings=False: input and output share their tables. Leave "
                "tie_word_embeddings=True, or use the embedding 'full'."
            )
        if self.tie_first_projection and not clusters.projected:
            warn(
                "no effect: model.embedding.tie_first_projection=true with div_val=1 and a d_embed that is d_model, where "
                "there is no projection. Leave it false.",
                UnusedSettingWarning,
            )

    def make_embedding(self, vocab_size: int, d_model: int, *, init_std: float) -> nn.Module:
        return AdaptiveEmbedding(self._clusters(vocab_size, d_model), init_std=init_std)

    def make_head(self, vocab_size: int, d_model: int, *, init_std: float) -> Head:
        return AdaptiveSoftmax(
            self._clusters(vocab_size, d_model), tie_first_projection=self.tie_first_projection, init_std=init_std
        )

    def _clusters(self, vocab_size: int, d_model: int) -> Clusters:
        return Clusters(
            vocab_size=vocab_size,
            cutoffs=self.cutoffs,
            div_val=self.div_val,
            d_embed=d_model if self.d_embed is None else self.d_embed,
            d_model=d_model,
        )
