"""The adaptive embedding: the vector of a word w of cluster i is P_i E_i[w], with E_i narrower the rarer its words."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deq_lm.heads.base import SelfInitialized
from deq_lm.heads.clusters import Clusters


class AdaptiveEmbedding(SelfInitialized):
    """Tables E_i, (n_i, d_i), and projections P_i, (D, d_i), side by side in one matrix.

    Every cluster looks up every position, with zeros for the words of others, and one matrix product projects them all:
    the host does not wait for the device, and no shape depends on the ids. That matters for more than speed. A product
    over the positions of one cluster alone may round otherwise when a later token moves to another cluster, and then a
    later token would have changed an earlier output.

    With div_val = 1 there is one table, and one projection if d_embed is not d_model (none if it is).

    Args:
        clusters: how the vocabulary is cut.
        init_std: standard deviation of the initial weights.

    References:
        Baevski and Auli 2019, "Adaptive input representations for neural language modeling", section 3. Dai et al. 2019,
        "Transformer-XL", whose code has the projections.
    """

    def __init__(self, clusters: Clusters, *, init_std: float = 0.05) -> None:
        super().__init__()
        self.clusters, self.init_std = clusters, init_std
        shapes = zip(clusters.sizes, clusters.widths, strict=True)
        if clusters.one_table:
            shapes = [(clusters.vocab_size, clusters.d_embed)]
        self.tables = nn.ModuleList(nn.Embedding(size, width) for size, width in shapes)
        self.projection: nn.Parameter | None = None
        if clusters.projected:
            width = clusters.d_embed if clusters.one_table else sum(clusters.widths)
            self.projection = nn.Parameter(torch.empty(clusters.d_model, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=self.init_std)

    def forward(self, ids: Tensor) -> Tensor:
        """Vectors (B, L, D) of ids (B, L) int64, not scaled."""
        embedded = self.tables[0](ids) if self.clusters.one_table else self._look_up(ids)
        return embedded if self.projection is None else F.linear(embedded, self.projection)

    def weights(self) -> tuple[Tensor, ...]:
        """E_i of each cluster, (n_i, d_i)."""
        tables = [table.weight for table in self.tables if isinstance(table, nn.Embedding)]
        return tables[0].split(list(self.clusters.sizes)) if self.clusters.one_table else tuple(tables)

    def projections(self) -> tuple[Tensor | None, ...]:
        """P_i of each cluster, (D, d_i); None where d_i is D without one."""
        if self.projection is None or self.clusters.one_table:
            return (self.projection,) * len(self.clusters.sizes)
        return self.projection.split(list(self.clusters.widths), dim=1)

    def _look_up(self, ids: Tensor) -> Tensor:
        """The clusters' vectors side by side, (B, L, sum of d_i), all but one of them 0."""
        cluster = self.clusters.of(ids)
        parts = []
        for i, (words, table) in enumerate(zip(self.clusters.words, self.tables, strict=True)):
            elsewhere = cluster != i
            part = table((ids - words.start).masked_fill(elsewhere, 0))
            parts.append(part.masked_fill(elsewhere[..., None], 0.0))
        return torch.cat(parts, dim=-1)
