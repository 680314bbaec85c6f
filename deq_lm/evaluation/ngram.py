"""Unigram and bigram models of the same tokens: what a language model has to beat.

Both subtract a discount d from every count and spread what is left by a broader distribution:

    unigram     p(w)   = max(c(w) - d, 0) / N             + d T / N       * 1 / V
    bigram      p(w|v) = max(c(v, w) - d, 0) / c(v)       + d T(v) / c(v) * p_cont(w)

with N tokens in all, V words of vocabulary, T of them seen (T(v) of them after v). p_cont is the first formula with
c(w) replaced by the number of different words that w has followed, which makes the bigram interpolated Kneser-Ney. After
a v that was never seen, p(w|v) = p_cont(w). Every p is positive and sums to 1 over the vocabulary.

References:
    Ney, Essen, Kneser 1994, "On structuring probabilistic dependences in stochastic language modelling" (discount
    n1 / (n1 + 2 n2), where n1 and n2 things were counted once and twice).
    Kneser, Ney 1995, "Improved backing-off for m-gram language modeling".
    Chen, Goodman 1999, "An empirical study of smoothing techniques for language modeling", section 2.8 (interpolated).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Unigram:
    """p(w), smoothed.

    Attributes:
        probabilities: (V,) float64.
    """

    probabilities: np.ndarray

    @classmethod
    def fit(cls, tokens: np.ndarray, vocab_size: int) -> Unigram:
        """Count tokens[1:]; tokens[0] is context only. `tokens` is 1-D, of integers below `vocab_size`."""
        return cls(_discounted(np.bincount(tokens[1:], minlength=vocab_size)))

    def nll_nats(self, tokens: np.ndarray) -> np.ndarray:
        """-log p of each of tokens[1:]."""
        return -np.log(self.probabilities)[tokens[1:]]


@dataclass(frozen=True)
class Bigram:
    """p(w|v), interpolated Kneser-Ney.

    Attributes:
        pairs: the seen pairs as v V + w, sorted, (P,) int64.
        discounted: max(c(v, w) - d, 0) / c(v) of each, (P,) float64.
        remainder: d T(v) / c(v), the share of p_cont after each v; 1 after a v that was never seen, (V,) float64.
        continuation: p_cont, (V,) float64.
    """

    pairs: np.ndarray
    discounted: np.ndarray
    remainder: np.ndarray
    continuation: np.ndarray

    @classmethod
    def fit(cls, tokens: np.ndarray, vocab_size: int) -> Bigram:
        """Count the pairs of consecutive tokens. Takes some 30 bytes a token while counting."""
        pairs, counts = np.unique(_codes(tokens, vocab_size), return_counts=True)
        first, second = np.divmod(pairs, vocab_size)
        discount = _discount(counts)
        context_counts = np.bincount(first, weights=counts, minlength=vocab_size)
        successors = np.bincount(first, minlength=vocab_size)  # T(v)
        return cls(
            pairs=pairs,
            discounted=np.maximum(counts - discount, 0) / context_counts[first],
            remainder=np.divide(
                discount * successors, context_counts, out=np.ones(vocab_size), where=context_counts > 0
            ),
            continuation=_discounted(np.bincount(second, minlength=vocab_size)),
        )

    def probabilities(self, context: np.ndarray, word: np.ndarray) -> np.ndarray:
        """p(word|context), elementwise, float64."""
        codes = context.astype(np.int64) * len(self.continuation) + word
        places = np.searchsorted(self.pairs, codes).clip(max=len(self.pairs) - 1)
        direct = np.where(self.pairs[places] == codes, self.discounted[places], 0.0)
        return direct + self.remainder[context] * self.continuation[word]

    def nll_nats(self, tokens: np.ndarray) -> np.ndarray:
        """-log p of each of tokens[1:], given the token before it."""
        return -np.log(self.probabilities(tokens[:-1], tokens[1:]))


def _codes(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    return tokens[:-1].astype(np.int64) * vocab_size + tokens[1:]


def _discounted(counts: np.ndarray) -> np.ndarray:
    """Absolute discounting of `counts`, (V,), interpolated with the uniform distribution."""
    discount = _discount(counts)
    removed = discount * np.count_nonzero(counts)
    return (np.maximum(counts - discount, 0) + removed / len(counts)) / counts.sum()


def _discount(counts: np.ndarray) -> float:
    """n1 / (n1 + 2 n2), in (0, 1]; 0.5 where nothing was counted once, which would leave nothing for the unseen."""
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    return once / (once + 2 * twice) if once else 0.5
