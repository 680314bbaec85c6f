"""How a vocabulary is cut, and which cuts are refused."""

import re

import pytest
import torch

from deq_lm.heads import Clusters


def make(**settings) -> Clusters:
    return Clusters(**{"vocab_size": 20, "cutoffs": (4, 9), "div_val": 2, "d_embed": 8, "d_model": 8, **settings})


def test_the_clusters_of_wikitext_103_are_those_of_transformer_xl():
    clusters = make(vocab_size=267_735, cutoffs=(20_000, 40_000, 200_000), div_val=4, d_embed=700, d_model=700)
    assert clusters.sizes == (20_000, 20_000, 160_000, 67_735)
    assert clusters.widths == (700, 175, 43, 10)
    assert sum(clusters.sizes) == 267_735


def test_every_word_is_in_one_cluster_and_ids_outside_the_vocabulary_in_the_nearest():
    clusters = make()
    assert [list(words) for words in clusters.words] == [[*range(4)], [*range(4, 9)], [*range(9, 20)]]
    ids = torch.arange(20)
    assert clusters.of(ids).tolist() == [0] * 4 + [1] * 5 + [2] * 11
    assert clusters.of(torch.tensor([[-100, 3], [20, 9]])).tolist() == [[0, 0], [2, 2]]


@pytest.mark.parametrize(
    ("settings", "projected"),
    [({}, True), ({"div_val": 1}, False), ({"div_val": 1, "d_embed": 6}, True), ({"d_embed": 6}, True)],
)
def test_embeddings_are_projected_unless_all_are_as_wide_as_the_model(settings: dict, projected: bool):
    assert make(**settings).projected is projected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cutoffs": ()}, "cutoffs=[]: expected the first id of one tail cluster or more"),
        ({"cutoffs": (0, 5)}, "cutoffs=[0, 5] with a vocabulary of 20: expected rising ids from 1 to 19"),
        ({"cutoffs": (-4,)}, "cutoffs=[-4] with a vocabulary of 20"),
        ({"cutoffs": (9, 4)}, "cutoffs=[9, 4]"),
        ({"cutoffs": (4, 4)}, "cutoffs=[4, 4]"),
        ({"cutoffs": (4, 20)}, "cutoffs=[4, 20] with a vocabulary of 20: expected rising ids from 1 to 19"),
        ({"div_val": 0}, "div_val=0: expected 1"),
        ({"d_embed": 0}, "d_embed=0: expected 1 or more, or null"),
        ({"div_val": 3}, "div_val=3 with d_embed=8 and 2 cutoffs: the last cluster would have width 8 // 9 = 0"),
    ],
)
def test_a_cut_that_cannot_be_is_refused(settings: dict, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**settings)
