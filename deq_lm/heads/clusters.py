"""How a vocabulary is cut: a shortlist of frequent words, then tail clusters of rarer words with narrower embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Clusters:
    """Cluster 0 is the shortlist; cluster i, i >= 1, begins at cutoffs[i - 1], and its embeddings have the width

        d_i = d_embed // div_val^i.

    Ids have to rise as frequencies fall, as those of the `word_level` tokenizer do: a cluster of mixed words costs what
    its rare ones should save.

    Attributes:
        vocab_size: words, V.
        cutoffs: the first id of each tail cluster, rising, in [1, V).
        div_val: what divides the width from one cluster to the next, 1 or more; 1 leaves it the same.
        d_embed: width of the shortlist's embeddings, d_0.
        d_model: width of the hidden states.

    Raises:
        ValueError: if a value is out of range, or the last width 0.

    References:
        Grave et al. 2017, "Efficient softmax approximation for GPUs". Baevski and Auli 2019, "Adaptive input
        representations for neural language modeling".
    """

    vocab_size: int
    cutoffs: tuple[int, ...]
    div_val: int
    d_embed: int
    d_model: int

    def __post_init__(self) -> None:
        cutoffs = list(self.cutoffs)
        if not cutoffs:
            raise ValueError(
                "cutoffs=[]: expected the first id of one tail cluster or more, such as [20000, 40000, 200000]. For a "
                "vocabulary in one piece use the embedding 'full'."
            )
        if any(a >= b for a, b in pairwise([0, *cutoffs, self.vocab_size])):
            raise ValueError(
                f"cutoffs={cutoffs} with a vocabulary of {self.vocab_size}: expected rising ids from 1 to "
                f"{self.vocab_size - 1}, the first word of each tail cluster. Leave out those beyond the vocabulary."
            )
        if self.div_val < 1:
            raise ValueError(
                f"div_val={self.div_val}: expected 1 (all clusters as wide as the first) or more, such as 4."
            )
        if self.d_embed < 1:
            raise ValueError(f"d_embed={self.d_embed}: expected 1 or more, or null for d_model.")
        if self.widths[-1] == 0:
            raise ValueError(
                f"div_val={self.div_val} with d_embed={self.d_embed} and {len(cutoffs)} cutoffs: the last cluster would "
                f"have width {self.d_embed} // {self.div_val ** len(cutoffs)} = 0. Lower div_val, drop cutoffs or raise "
                "d_embed."
            )

    @property
    def words(self) -> tuple[range, ...]:
        """The ids of each cluster."""
        return tuple(range(a, b) for a, b in pairwise([0, *self.cutoffs, self.vocab_size]))

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many words each cluster has, n_i."""
        return tuple(map(len, self.words))

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the embeddings of each cluster, d_i."""
        return tuple(self.d_embed // self.div_val**i for i in range(len(self.cutoffs) + 1))

    @property
    def num_tails(self) -> int:
        """Clusters beside the shortlist."""
        return len(self.cutoffs)

    @property
    def one_table(self) -> bool:
        """Whether all clusters have the same width, and are the rows of one table with at most one projection."""
        return self.div_val == 1

    @property
    def projected(self) -> bool:
        """Whether embeddings are projected to d_model. With several tables the first is, too, even if it is as wide."""
        return not self.one_table or self.d_embed != self.d_model

    def of(self, ids: Tensor) -> Tensor:
        """The cluster of each id, the same shape; the first and the last also of ids below and beyond the vocabulary."""
        cluster = torch.zeros_like(ids)
        for cutoff in self.cutoffs:
            cluster += ids >= cutoff
        return cluster
