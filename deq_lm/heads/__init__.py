"""The vocabulary's two ends: from token ids to vectors, and from hidden states to nats."""

from deq_lm.heads.adaptive import AdaptiveEmbeddingConfig
from deq_lm.heads.adaptive_embedding import AdaptiveEmbedding
from deq_lm.heads.adaptive_softmax import AdaptiveSoftmax
from deq_lm.heads.base import EmbeddingConfig, Head
from deq_lm.heads.clusters import Clusters
from deq_lm.heads.full import FullEmbeddingConfig
from deq_lm.heads.linear import LinearHead, token_nll

__all__ = [
    "AdaptiveEmbedding",
    "AdaptiveEmbeddingConfig",
    "AdaptiveSoftmax",
    "Clusters",
    "EmbeddingConfig",
    "FullEmbeddingConfig",
    "Head",
    "LinearHead",
    "token_nll",
]
