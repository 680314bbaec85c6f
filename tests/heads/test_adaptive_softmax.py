"""The adaptive softmax against a dense one built from the published probabilities, in float64."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deq_lm.heads import AdaptiveEmbedding, AdaptiveSoftmax, Clusters
from deq_lm.heads.linear import MAX_LOGITS

CUTS = {
    "four tables": {"cutoffs": (4, 9, 15), "div_val": 2},
    "narrower than the model": {"cutoffs": (4, 9), "div_val": 2, "d_embed": 6},
    "one table": {"cutoffs": (4, 9), "div_val": 1},
    "one table and a projection": {"cutoffs": (4, 9), "div_val": 1, "d_embed": 5},
}


def make(
    name: str = "four tables", *, tie_first_projection: bool = False, **changes
) -> tuple[AdaptiveEmbedding, AdaptiveSoftmax]:
    """An embedding and its softmax, with biases that are not 0."""
    clusters = Clusters(**{"vocab_size": 20, "d_embed": 8, "d_model": 8, **CUTS[name], **changes})
    torch.manual_seed(0)
    embedding = AdaptiveEmbedding(clusters, init_std=0.7).double()
    softmax = AdaptiveSoftmax(clusters, tie_first_projection=tie_first_projection, init_std=0.7).double()
    with torch.no_grad():
        softmax.bias.normal_()
        softmax.cluster_bias.normal_()
    return embedding, softmax


def make_batch(embedding: AdaptiveEmbedding, shape: tuple[int, int] = (3, 10)) -> tuple[Tensor, Tensor]:
    """Hidden states, and targets of which three are not scored."""
    generator = torch.Generator().manual_seed(1)
    size = embedding.clusters
    hidden = torch.randn(*shape, size.d_model, dtype=torch.float64, generator=generator, requires_grad=True)
    targets = torch.randint(size.vocab_size, shape, generator=generator)
    targets[0, :2] = targets[-1, -1] = -100
    return hidden, targets


def probabilities(embedding: AdaptiveEmbedding, softmax: AdaptiveSoftmax, hidden: Tensor) -> Tensor:
    """p(word) of every word, (B, L, V): the product of two softmaxes for words of the tails."""
    clusters = embedding.clusters
    starts = [0, *clusters.cutoffs, clusters.vocab_size]
    logits = []
    for i, (start, stop) in enumerate(pairwise(starts)):
        if clusters.div_val == 1:
            table, projection = embedding.tables[0].weight[start:stop], embedding.projection
        else:
            widths = [clusters.d_embed // clusters.div_val**k for k in range(i + 1)]
            table, projection = embedding.tables[i].weight, embedding.projection[:, sum(widths[:-1]) : sum(widths)]
        if i == 0 and softmax.projection is not None:
            projection = softmax.projection
        down = hidden if projection is None else torch.einsum("blD,Dd->bld", hidden, projection)
        rows = torch.einsum("bld,wd->blw", down, table) + softmax.bias[start:stop]
        if i == 0:
            entries = torch.einsum("bld,cd->blc", down, softmax.cluster_weight) + softmax.cluster_bias
            rows = torch.cat([rows, entries], dim=-1)
        logits.append(rows.softmax(dim=-1))
    head, *tails = logits
    words, entries = head[..., : starts[1]], head[..., starts[1] :]
    return torch.cat([words, *(entries[..., i, None] * tail for i, tail in enumerate(tails))], dim=-1)


def inputs_of(hidden: Tensor, *modules: nn.Module) -> list[Tensor]:
    return [hidden, *(parameter for module in modules for parameter in module.parameters())]


@pytest.mark.parametrize("tie_first_projection", [False, True])
@pytest.mark.parametrize("name", CUTS)
def test_nats_and_every_gradient_are_those_of_the_dense_distribution(name: str, tie_first_projection: bool):
    embedding, softmax = make(name, tie_first_projection=tie_first_projection)
    hidden, targets = make_batch(embedding)
    dense = probabilities(embedding, softmax, hidden)
    torch.testing.assert_close(dense.sum(-1), torch.ones_like(dense[..., 0]), rtol=0, atol=1e-12)
    scored = targets != -100
    expected = -dense.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1).log()[scored].sum()
    found, count = softmax.nll(hidden, targets, embedding)
    assert count == 27
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    inputs = inputs_of(hidden, embedding, softmax)
    for a, b in zip(
        torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs, allow_unused=True), strict=True
    ):
        # The input's own first projection, where the output has another, is the one the loss does not reach.
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CUTS)
def test_logits_are_the_log_probabilities(name: str):
    embedding, softmax = make(name)
    hidden, _ = make_batch(embedding)
    found = softmax.logits(hidden, embedding)
    torch.testing.assert_close(found, probabilities(embedding, softmax, hidden).log(), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.logsumexp(-1), torch.zeros_like(found[..., 0]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk_positions", [1, 4, 7, 30, 100])
def test_chunks_change_neither_the_sum_nor_its_gradients(chunk_positions: int):
    embedding, softmax = make()
    hidden, targets = make_batch(embedding)
    inputs = inputs_of(hidden, embedding, softmax)
    expected, _ = softmax.nll(hidden, targets, embedding)
    found, count = softmax.nll(hidden, targets, embedding, chunk_positions=chunk_positions)
    assert count == 27
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for a, b in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("words", [[0, 1, 3], [9, 14], [19], [0, 19]], ids=str)
def test_clusters_without_a_target_get_a_gradient_of_zero_and_not_none(words: list[int]):
    embedding, softmax = make(tie_first_projection=True)
    hidden, _ = make_batch(embedding)
    targets = torch.tensor(words).repeat(30)[:30].view(3, 10)
    total, count = softmax.nll(hidden, targets, embedding)
    expected = -probabilities(embedding, softmax, hidden).gather(-1, targets[..., None]).log().sum()
    assert count == 30
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    gradients = torch.autograd.grad(total, [table.weight for table in embedding.tables])
    reached = {0, *embedding.clusters.of(targets).flatten().tolist()}  # the head always
    assert {i for i, gradient in enumerate(gradients) if gradient.any()} == reached


def test_no_scored_target_is_zero_nats_and_no_gradient_and_not_nan():
    embedding, softmax = make()
    hidden, targets = make_batch(embedding)
    total, count = softmax.nll(hidden, torch.full_like(targets, -100), embedding)
    assert (total.item(), count.item()) == (0.0, 0)
    assert not any(gradient.any() for gradient in torch.autograd.grad(total, inputs_of(hidden, embedding, softmax)))


@pytest.mark.parametrize("target", [-1, 20])
def test_a_target_outside_the_vocabulary_is_an_error(target: int):
    embedding, softmax = make()
    hidden, targets = make_batch(embedding)
    targets[1, 1] = target
    with pytest.raises(IndexError):
        softmax.nll(hidden, targets, embedding)


def kept_bytes(run: Callable[[], object]) -> int:
    """Of the distinct storages that autograd keeps for the backward pass of what `run` computes."""
    tensors: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (tensors.append(t), t)[1], lambda t: t):
        run()
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_the_logits_of_all_positions_are_never_kept():
    embedding, softmax = make(vocab_size=3000, cutoffs=(500, 1000, 2000), d_embed=16, d_model=16)
    hidden, _ = make_batch(embedding, (4, 64))
    targets = torch.arange(256).mul(2).add(488).view(4, 64)  # a few of the shortlist, most of the first tail
    kept = {
        chunk: kept_bytes(lambda c=chunk: softmax.nll(hidden, targets, embedding, chunk_positions=c))
        for chunk in (16, 256)
    }
    head, tail = 503 * 256 * 8, 500 * 250 * 8
    assert kept[256] > head + tail
    assert kept[16] < (head + tail) / 4  # tables, hidden states, and what is left of them in narrower spaces


def test_a_tied_first_projection_is_the_embeddings_and_another_is_the_heads_own():
    for tied in (True, False):
        embedding, softmax = make(tie_first_projection=tied)
        assert ("projection" in dict(softmax.named_parameters())) is not tied
        hidden, _ = make_batch(embedding)
        total, _ = softmax.nll(hidden, torch.zeros(3, 10, dtype=torch.long), embedding)
        (gradient,) = torch.autograd.grad(total, embedding.projection)
        assert bool(gradient[:, :8].any()) is tied


def test_a_tail_is_computed_only_where_the_target_lies_in_it(monkeypatch):
    embedding, softmax = make()
    hidden, targets = make_batch(embedding)
    rows: dict[int, int] = {}
    linear = F.linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if bias is not None:
            rows[len(weight)] = len(x)
        return linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", counted)
    softmax.nll(hidden, targets, embedding)
    sizes = dict(enumerate(embedding.clusters.sizes))
    expected = {sizes[i]: int((embedding.clusters.of(targets) == i).sum()) for i in (2, 3)}
    assert {size: rows[size] for size in expected} == expected
    assert rows[4 + 3] == 30  # the head: of all positions


def test_a_large_vocabulary_is_chunked_without_being_asked():
    sizes: list[int] = []
    clusters = Clusters(vocab_size=MAX_LOGITS // 8, cutoffs=(8, 16), div_val=1, d_embed=2, d_model=2)
    embedding, softmax = AdaptiveEmbedding(clusters), AdaptiveSoftmax(clusters)
    hidden = torch.randn(1, 9, 2, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
        softmax.nll(hidden, torch.full((1, 9), clusters.vocab_size - 1), embedding)
    assert max(sizes) <= 2 * clusters.vocab_size  # the table, and no logits


def test_under_autocast_the_log_softmax_is_in_float32():
    embedding, softmax = (module.float() for module in make())
    hidden, targets = make_batch(embedding)
    hidden = hidden.detach().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = softmax.nll(hidden, targets, embedding)
        logits = softmax.logits(hidden, embedding)
    assert total.dtype == logits.dtype == torch.float32
    # In bfloat16 they would be off by more than 1e-3.
    torch.testing.assert_close(logits.logsumexp(-1), torch.zeros(3, 10), rtol=0, atol=1e-6)
    exact, _ = softmax.nll(hidden, targets, embedding)
    torch.testing.assert_close(total, exact, rtol=0.02, atol=0)
    assert total != exact  # the autocast did reach the products


def test_in_half_precision_log_probabilities_are_summed_in_float32():
    embedding, softmax = (module.bfloat16() for module in make())
    hidden, targets = make_batch(embedding)
    total, _ = softmax.nll(hidden.detach().bfloat16(), targets, embedding)
    logits = softmax.logits(hidden.detach().bfloat16(), embedding)
    assert total.dtype == logits.dtype == torch.float32


def test_chunks_of_nothing_are_refused():
    embedding, softmax = make()
    hidden, targets = make_batch(embedding)
    with pytest.raises(ValueError, match=r"chunk_positions=0\): expected 1 or more"):
        softmax.nll(hidden, targets, embedding, chunk_positions=0)


def test_biases_start_at_zero_and_matrices_with_the_stated_spread():
    clusters = Clusters(vocab_size=2000, cutoffs=(500, 1000), div_val=2, d_embed=64, d_model=64)
    softmax = AdaptiveSoftmax(clusters, init_std=0.3)
    assert not softmax.bias.any()
    assert not softmax.cluster_bias.any()
    embedding = AdaptiveEmbedding(clusters, init_std=0.3)
    for parameter in (softmax.projection, softmax.cluster_weight, *embedding.parameters()):
        assert parameter.std().item() == pytest.approx(0.3, rel=0.2)
