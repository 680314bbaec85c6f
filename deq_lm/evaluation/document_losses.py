"""Losses summed over each document of a split: what intervals are made of, and what pairs the losses of two models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from deq_lm.errors import DataError
from deq_lm.evaluation.bootstrap import Interval, ratio_interval

Denominator = Literal["num_tokens", "num_words", "num_bytes"]


@dataclass(frozen=True, kw_only=True)
class DocumentLosses:
    """The documents of a split in their order, D of them.

    Attributes:
        fingerprint: sha256 of their texts, the same whatever the tokenizer.
        num_tokens, num_words, num_bytes: of each document.
        nll_nats: the sum of -log p over the tokens of each, by model: "model", "bigram" and "unigram"; of a model whose
            loss is not finite, none.
    """

    fingerprint: str
    num_tokens: tuple[int, ...]
    num_words: tuple[int, ...]
    num_bytes: tuple[int, ...]
    nll_nats: Mapping[str, tuple[float, ...]]

    def __len__(self) -> int:
        return len(self.num_tokens)

    def interval(self, model: str, per: Denominator) -> Interval | None:
        """Of the nats per token, word or byte of a model; None of a single document or a loss that is not finite."""
        if model not in self.nll_nats:
            return None
        return ratio_interval(np.array(self.nll_nats[model]), np.array(getattr(self, per)))


@dataclass(frozen=True)
class PairedDifference:
    """Attributes:
    nats_per_word: of one model less that of another; below 0 the first is better.
    interval: of it; None where there is none.
    num_documents: that both were measured on.
    """

    nats_per_word: float
    interval: Interval | None
    num_documents: int

    @property
    def is_evident(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.interval is not None and not self.interval.low <= 0 <= self.interval.high


def paired_difference_of_documents(losses: DocumentLosses | None, others: DocumentLosses | None) -> PairedDifference:
    """How much more a model loses a word than another on the same documents, whatever their tokenizers.

    What makes a document hard is the same for both and cancels, so that the interval is narrower than those of the two.

    Raises:
        DataError: a result has no losses of documents or no finite ones, or they are of other documents.
    """
    if losses is None or others is None:
        raise DataError(
            "a result without the losses of its documents, as deq_lm wrote before it kept them, cannot be paired. Measure "
            "again, with eval/evaluate.py."
        )
    if losses.fingerprint != others.fingerprint or losses.num_words != others.num_words:
        raise DataError(
            f"results of different texts cannot be paired: {len(losses):,} documents with the SHA-256 "
            f"{losses.fingerprint[:12]}, and {len(others):,} with {others.fingerprint[:12]}. Measure both on the same "
            "split of the same corpus."
        )
    if not ("model" in losses.nll_nats and "model" in others.nll_nats):
        raise DataError("a loss that is not finite cannot be compared. Leave that result out.")
    difference = np.array(losses.nll_nats["model"]) - np.array(others.nll_nats["model"])
    words = np.array(losses.num_words)
    if not words.any():
        raise DataError("the documents have no words to divide by. Compare results of a text with words.")
    return PairedDifference(float(difference.sum() / words.sum()), ratio_interval(difference, words), len(words))


def sums_of_documents(nats: np.ndarray, ends: np.ndarray) -> tuple[float, ...]:
    """The nats of consecutive targets, (N,), summed over each document; `ends`, (D,), are the targets after their last."""
    starts = np.concatenate([[0], ends[:-1]])
    return tuple(float(nats[start:end].sum()) for start, end in zip(starts, ends, strict=True))
