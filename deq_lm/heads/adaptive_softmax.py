"""The adaptive softmax: nats of targets from hidden states, without the logits of most words.

The head is a softmax over the words of the shortlist and one entry for each tail cluster. A word of tail cluster i has

    p(w) = p(cluster i) p(w | cluster i),

so that the tail's logits are computed only where the target lies in it. With h the hidden state, P_i and E_i the
projection and table of the input embedding (`adaptive_embedding.py`) and b_i biases, the logits of cluster i are

    E_i P_i^T h + b_i.

Why not `torch.nn.AdaptiveLogSoftmaxWithLoss` (torch 2.13): it makes matrices of its own. Those of the tails could be
assigned, but the head is one `nn.Linear` over shortlist and clusters that reads h as it is: a table with a projection, and
rows that belong to the input embedding, have no place in it. Its tails have no biases; it refuses targets that are not to
be scored; the logits of the head exist for all positions at once and are kept for the backward pass; and its `nonzero`
makes the host wait for the device once a cluster.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deq_lm.heads.adaptive_embedding import AdaptiveEmbedding
from deq_lm.heads.base import Head, Reduction, SelfInitialized
from deq_lm.heads.clusters import Clusters
from deq_lm.heads.linear import token_nll


class AdaptiveSoftmax(Head, SelfInitialized):
    """Scores words by the tables and projections of the embedding it is given, and by what it has of its own:

    biases of the words, (V,), of the tail clusters' entries in the head, (C,), the entries themselves, (C, d_0), and with
    `tie_first_projection=False` a P_0, (D, d_0).

    Args:
        clusters: how the vocabulary is cut, as in the embedding.
        tie_first_projection: whether the head uses the embedding's P_0, too. Transformer-XL does not on WikiText-103
            (tie_projs = [False, True, True, True]).
        init_std: standard deviation of the initial weights; biases are 0.

    References:
        Grave et al. 2017, "Efficient softmax approximation for GPUs", section 4. Baevski and Auli 2019, "Adaptive input
        representations for neural language modeling". Dai et al. 2019, "Transformer-XL", whose code has the biases.
    """

    def __init__(self, clusters: Clusters, *, tie_first_projection: bool = False, init_std: float = 0.05) -> None:
        super().__init__()
        self.clusters, self.init_std = clusters, init_std
        self.bias = nn.Parameter(torch.empty(clusters.vocab_size))
        self.cluster_weight = nn.Parameter(torch.empty(clusters.num_tails, clusters.d_embed))
        self.cluster_bias = nn.Parameter(torch.empty(clusters.num_tails))
        self.projection: nn.Parameter | None = None
        if clusters.projected and not tie_first_projection:
            self.projection = nn.Parameter(torch.empty(clusters.d_model, clusters.d_embed))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            if "bias" in name:
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=self.init_std)

    def nll(
        self,
        hidden: Tensor,
        targets: Tensor,
        embedding: nn.Module,
        *,
        reduction: Reduction = "sum",
        chunk_positions: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `Head.nll`. The logits of more than `chunk_positions` positions never exist at once, see `token_nll`.

        How many targets each tail has is data, and the host waits for it: once a call, however many clusters there are,
        before the products begin. The backward pass does not wait.

        Args:
            hidden: (B, L, D).
            targets: (B, L) int64; -100 is not scored.
            embedding: an `AdaptiveEmbedding` of the same clusters.
            reduction: as of `Head.nll`.
            chunk_positions: positions per chunk, 1 or more; None takes as many as `token_nll` would of each cluster.

        Raises:
            ValueError: if chunk_positions is below 1.
        """
        rows, flat_targets = hidden.flatten(0, -2), targets.flatten()
        cluster = self.clusters.of(flat_targets)  # (B L,), 0 where not scored
        counts = torch.stack([(cluster == i).sum() for i in range(len(self.clusters.sizes))])
        _, *tails = cluster.argsort(stable=True).split(counts.tolist())  # the positions of each cluster, in order
        (weight, bias, projection), *tail_layers = self._layers(embedding)

        entry = torch.where(cluster > 0, self.clusters.sizes[0] + cluster - 1, flat_targets)
        settings: Any = {"chunk_positions": chunk_positions, "reduction": reduction}
        nats, count = token_nll(_project(rows, projection), weight, entry, bias=bias, **settings)
        for positions, (weight, bias, projection), words in zip(
            tails, tail_layers, self.clusters.words[1:], strict=True
        ):
            # A tail without a target is computed, too, of no rows: its parameters get a gradient of 0, and not none.
            tail_nats, _ = token_nll(
                _project(rows.index_select(0, positions), projection),
                weight,
                flat_targets.index_select(0, positions) - words.start,
                bias=bias,
                **settings,
            )
            nats = nats + tail_nats if reduction == "sum" else nats.index_add(0, positions, tail_nats)
        return nats if reduction == "sum" else nats.view_as(targets), count

    def logits(self, hidden: Tensor, embedding: nn.Module) -> Tensor:
        """log p of every word, (B, L, V), float32 at least; they sum to 1. Arguments as those of `nll`."""
        head, *tails = [_log_softmax(hidden, *layer) for layer in self._layers(embedding)]
        words, clusters = head.split([self.clusters.sizes[0], self.clusters.num_tails], dim=-1)
        tails = [tail + clusters[..., i : i + 1] for i, tail in enumerate(tails)]
        return torch.cat([words, *tails], dim=-1)

    def _layers(self, embedding: nn.Module) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """Weight, bias and projection of the head, and of each tail."""
        assert isinstance(embedding, AdaptiveEmbedding)
        assert embedding.clusters == self.clusters
        weights, projections = list(embedding.weights()), list(embedding.projections())
        biases = list(self.bias.split(list(self.clusters.sizes)))
        weights[0] = torch.cat([weights[0], self.cluster_weight])
        biases[0] = torch.cat([biases[0], self.cluster_bias])
        if self.projection is not None:
            projections[0] = self.projection
        return list(zip(weights, biases, projections, strict=True))


def _project(hidden: Tensor, projection: Tensor | None) -> Tensor:
    """P^T h: (..., D) to (..., d_i)."""
    return hidden if projection is None else F.linear(hidden, projection.t())


def _log_softmax(hidden: Tensor, weight: Tensor, bias: Tensor, projection: Tensor | None) -> Tensor:
    logits = F.linear(_project(hidden, projection), weight, bias)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
