"""The adaptive embedding against a loop over words that follows the published equations, in float64."""

import pytest
import torch
from torch import Tensor

from deq_lm.heads import AdaptiveEmbedding, Clusters

CUTS = {
    "four tables": {"cutoffs": (4, 9, 15), "div_val": 2},
    "narrower than the model": {"cutoffs": (4, 9), "div_val": 2, "d_embed": 6},
    "wider than the model": {"cutoffs": (4, 9), "div_val": 2, "d_embed": 12},
    "one table": {"cutoffs": (4, 9), "div_val": 1},
    "one table and a projection": {"cutoffs": (4, 9), "div_val": 1, "d_embed": 5},
}


def make(name: str) -> AdaptiveEmbedding:
    clusters = Clusters(**{"vocab_size": 20, "d_embed": 8, "d_model": 8, **CUTS[name]})
    torch.manual_seed(0)
    return AdaptiveEmbedding(clusters, init_std=1.0).double()


def by_words(embedding: AdaptiveEmbedding, ids: Tensor) -> Tensor:
    """P_i E_i[w], one word after the other."""
    clusters = embedding.clusters
    starts = [0, *clusters.cutoffs]
    vectors = []
    for word in ids.flatten().tolist():
        i = max(k for k, start in enumerate(starts) if word >= start)
        if clusters.div_val == 1:
            vector, projection = embedding.tables[0].weight[word], embedding.projection
        else:
            width = clusters.d_embed // clusters.div_val**i
            before = sum(clusters.d_embed // clusters.div_val**k for k in range(i))
            vector = embedding.tables[i].weight[word - starts[i]]
            projection = embedding.projection[:, before : before + width]
        vectors.append(vector if projection is None else projection @ vector)
    return torch.stack(vectors).unflatten(0, ids.shape)


@pytest.mark.parametrize("name", CUTS)
def test_a_vector_is_the_projection_of_a_row_of_its_clusters_table(name: str):
    embedding, ids = make(name), torch.randperm(20).view(2, 10)
    found, expected = embedding(ids), by_words(embedding, ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    cotangent = torch.randn_like(found)
    parameters = list(embedding.parameters())
    gradients = [torch.autograd.grad(vectors, parameters, cotangent) for vectors in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CUTS)
def test_what_the_output_shares_is_what_the_input_uses(name: str):
    embedding = make(name)
    tables, projections = embedding.weights(), embedding.projections()
    assert [tuple(table.shape) for table in tables] == [
        *zip(embedding.clusters.sizes, embedding.clusters.widths, strict=True)
    ]
    vectors = [
        table if projection is None else table @ projection.T
        for table, projection in zip(tables, projections, strict=True)
    ]
    torch.testing.assert_close(torch.cat(vectors), embedding(torch.arange(20)), rtol=0, atol=1e-12)


def test_it_has_no_more_parameters_than_tables_and_projections():
    count = {name: sum(p.numel() for p in make(name).parameters()) for name in CUTS}
    assert count["four tables"] == 4 * 8 + 5 * 4 + 6 * 2 + 5 * 1 + 8 * (8 + 4 + 2 + 1)
    assert count["one table"] == 20 * 8
    assert count["one table and a projection"] == 20 * 5 + 8 * 5


def test_a_word_in_another_cluster_changes_no_bit_of_the_other_vectors():
    clusters = Clusters(vocab_size=2000, cutoffs=(20, 200), div_val=2, d_embed=64, d_model=64)
    embedding = AdaptiveEmbedding(clusters)
    ids = torch.randint(2000, (4, 33), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, 17:] = torch.randint(20, (4, 16), generator=torch.Generator().manual_seed(1))
    before, after = embedding(ids), embedding(changed)
    assert torch.equal(before[:, :17], after[:, :17])
    assert not torch.equal(before, after)


def test_clusters_without_a_word_get_a_gradient_of_zero_and_not_none():
    embedding = make("four tables")
    embedding(torch.zeros(2, 3, dtype=torch.long)).sum().backward()
    assert all(table.weight.grad is not None for table in embedding.tables)
    assert not any(table.weight.grad.any() for table in list(embedding.tables)[1:])


@pytest.mark.parametrize("word", [-1, 20])
@pytest.mark.parametrize("name", ["four tables", "one table"])
def test_a_word_outside_the_vocabulary_is_an_error_and_not_a_zero(name: str, word: int):
    with pytest.raises(IndexError):
        make(name)(torch.tensor([[3, word]]))


def test_a_table_that_is_not_finite_spoils_only_its_own_words():
    embedding = make("four tables")
    with torch.no_grad():
        embedding.tables[3].weight.fill_(float("nan"))
    found = embedding(torch.tensor([[1, 5, 10, 15]]))
    assert found[0, :3].isfinite().all()
    assert found[0, 3].isnan().all()
