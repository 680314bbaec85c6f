"""Intervals of nats per word, or per anything: documents drawn anew with replacement, and their sums divided once.

The tokens of a document are not independent of each other, so that an interval from tokens is several times too narrow;
documents very nearly are. The estimate is a ratio of sums over documents, sum(nats) / sum(words), and so is that of each
draw of as many documents. Percentiles of the draws are too narrow for few documents; they are taken as far out as would
make them Student's t interval if the estimate were a mean of normal values.

References:
    Efron, Tibshirani 1993, "An introduction to the bootstrap", chapter 13 (percentiles). Hesterberg 2015, "What teachers
    should know about the bootstrap", The American Statistician 69(4), section 4.2 (percentiles further out).
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

LEVEL = 0.95
NUM_DRAWS = 10_000
_DRAWN_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Interval:
    """Where the true value lies at a confidence of 95 %."""

    low: float
    high: float


def ratio_interval(sums: np.ndarray, counts: np.ndarray, *, seed: int = 0) -> Interval | None:
    """The interval of sum(sums) / sum(counts) over documents; with differences of losses as `sums`, that of paired models.

    Args:
        sums: (D,), of each document.
        counts: what they are divided by, (D,), 0 or more.
        seed: of the draws.

    Returns:
        None where there is none: of fewer than two documents, or values that are not finite.
    """
    num_documents = len(sums)
    if num_documents < 2 or not np.isfinite(sums).all() or not counts.any():
        return None
    generator = np.random.default_rng(seed)
    ratios = []
    at_once = max(1, _DRAWN_AT_ONCE // num_documents)
    for done in range(0, NUM_DRAWS, at_once):
        drawn = generator.integers(num_documents, size=(min(at_once, NUM_DRAWS - done), num_documents))
        totals = counts[drawn].sum(axis=1)
        ratios.append(sums[drawn].sum(axis=1)[totals > 0] / totals[totals > 0])
    tail = _tail(num_documents)
    low, high = np.quantile(np.concatenate(ratios), (tail, 1 - tail)).tolist()
    return Interval(low, high)


def _tail(num_documents: int) -> float:
    """What to leave out on each side."""
    degrees = num_documents - 1
    normal = NormalDist()
    z = normal.inv_cdf((1 + LEVEL) / 2)
    # Student's quantile by its expansion in 1 / degrees (Abramowitz, Stegun 1964, 26.7.5)
    t = z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    return normal.cdf(-t * (num_documents / degrees) ** 0.5)
