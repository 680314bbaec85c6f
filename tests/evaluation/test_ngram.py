"""The baselines are probability distributions, and the ones their formulas say."""

from __future__ import annotations

import math

import numpy as np
import pytest

from deq_lm.evaluation.ngram import Bigram, Unigram

TEXT = np.array([0, 1, 2, 1, 2, 1, 3, 0, 1, 2, 4, 1, 2, 2], dtype=np.uint16)


def every_bigram(model: Bigram, vocab_size: int) -> np.ndarray:
    context, word = np.meshgrid(np.arange(vocab_size), np.arange(vocab_size), indexing="ij")
    return model.probabilities(context.ravel(), word.ravel()).reshape(vocab_size, vocab_size)


@pytest.mark.parametrize(
    ("tokens", "vocab_size"),
    [
        (TEXT, 7),  # two words are never seen, one is only the context
        (np.array([0, 1, 2, 3]), 5),  # every pair once: the discount is 1
        (np.array([0, 1, 0, 1, 0, 1, 0, 1, 0]), 3),  # nothing once
        (np.array([2, 2, 2, 2]), 3),
        (np.random.default_rng(0).zipf(1.3, 5000).clip(max=199).astype(np.uint32), 200),
    ],
)
def test_probabilities_are_positive_and_sum_to_one_in_every_context(tokens: np.ndarray, vocab_size: int):
    unigram = Unigram.fit(tokens, vocab_size).probabilities
    bigram = every_bigram(Bigram.fit(tokens, vocab_size), vocab_size)
    np.testing.assert_allclose(unigram.sum(), 1, rtol=1e-12)
    np.testing.assert_allclose(bigram.sum(axis=1), 1, rtol=1e-12)
    assert (unigram > 0).all()
    assert (bigram > 0).all()


def test_a_unigram_by_hand():
    # targets 1 2 1 2 1 3 0 1 2 4 1 2 2: c(0..4) = 1 5 5 1 1, so n1 = 3, n2 = 0 and d = 1
    expected = (np.array([0, 4, 4, 0, 0, 0, 0]) + 5 / 7) / 13
    np.testing.assert_allclose(Unigram.fit(TEXT, 7).probabilities, expected, rtol=1e-12)


def test_a_bigram_by_hand():
    # pairs 01:2 12:4 21:2 13:1 30:1 24:1 41:1 22:1, so n1 = 5, n2 = 2 and d = 5/9
    d = 5 / 9
    # words followed: 0 after 3; 1 after 0, 2, 4; 2 after 1, 2; 3 after 1; 4 after 2: N = 8, n1 = 3, n2 = 1, d = 3/5
    continuation = (np.array([0.4, 2.4, 1.4, 0.4, 0.4, 0, 0]) + 0.6 * 5 / 7) / 8
    found = every_bigram(Bigram.fit(TEXT, 7), 7)
    np.testing.assert_allclose(found[5], continuation, rtol=1e-12)  # never a context
    after_one = np.array([0, 0, 4 - d, 1 - d, 0, 0, 0]) / 5 + d * 2 / 5 * continuation
    np.testing.assert_allclose(found[1], after_one, rtol=1e-12)


def test_a_score_is_the_sum_over_all_targets_each_after_its_own_context():
    held_out = np.array([0, 1, 2, 5, 6], dtype=np.uint16)
    unigram, bigram = Unigram.fit(TEXT, 7), Bigram.fit(TEXT, 7)
    table = every_bigram(bigram, 7)
    by_hand = -sum(math.log(table[v, w]) for v, w in [(0, 1), (1, 2), (2, 5), (5, 6)])
    assert bigram.nll_nats(held_out).sum() == pytest.approx(by_hand, rel=1e-12)
    by_hand = -sum(math.log(unigram.probabilities[w]) for w in (1, 2, 5, 6))
    assert unigram.nll_nats(held_out).sum() == pytest.approx(by_hand, rel=1e-12)


def test_pairs_of_a_large_vocabulary_do_not_overflow_small_integers():
    tokens = np.array([0, 65534, 65533, 65534, 65533, 65534], dtype=np.uint16)
    model = Bigram.fit(tokens, 65536)
    common, never = model.probabilities(np.array([65534, 65534]), np.array([65533, 65534]))
    assert common > 0.5 > never


def test_on_text_from_a_markov_chain_the_bigram_comes_close_to_its_entropy_and_the_unigram_does_not():
    rng = np.random.default_rng(0)
    chain = rng.dirichlet(np.full(30, 0.1), size=30)
    tokens = [0]
    for draw in rng.random(60_000):
        tokens.append(int(np.searchsorted(chain[tokens[-1]].cumsum(), draw).clip(max=29)))
    train, test = np.array(tokens[:50_000]), np.array(tokens[50_000:])
    entropy = -np.log(chain[test[:-1], test[1:]]).mean()
    bigram = Bigram.fit(train, 30).nll_nats(test).sum() / (len(test) - 1)
    unigram = Unigram.fit(train, 30).nll_nats(test).sum() / (len(test) - 1)
    assert entropy < bigram < entropy + 0.02
    assert unigram > bigram + 0.3
