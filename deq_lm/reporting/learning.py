"""What runs have logged on the way, a row for each model: losses of the validation and of the training text, and memory."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence

from deq_lm.reporting.table import Row, number, ratio
from deq_lm.suites import LearningResult

MOST_COLUMNS = 8

_Point = tuple[str, int, float | None]
"""Model, tokens, nats per token."""


def validation_rows(results: Sequence[LearningResult]) -> list[Row]:
    """Validation loss after so many tokens: see `_rows`."""

    def points() -> Iterator[_Point]:
        for result in results:
            training = result.recipe["training"]
            tokens_per_step = training["batch_size"] * training["segment_length"] * training["gradient_accumulation"]
            for point in result.validation:
                yield result.model, point.step * tokens_per_step, point.nats_per_token

    return _rows(points())


def training_rows(results: Sequence[LearningResult]) -> list[Row]:
    """Training loss of the steps that were logged together just before so many tokens: see `_rows`."""
    return _rows(
        (result.model, point.num_tokens, point.nats_per_token) for result in results for point in result.training
    )


def _rows(points: Iterable[_Point]) -> list[Row]:
    """Losses by tokens, the mean where a model has several runs; a dash where one has ended before.

    Of points that are too many for a table, the last is shown and others evenly spaced before it.
    """
    losses: dict[str, dict[int, list[float | None]]] = {}
    for model, tokens, nats in points:
        losses.setdefault(model, {}).setdefault(tokens, []).append(nats)
    budgets = sorted({tokens for of_model in losses.values() for tokens in of_model})
    every = max(1, math.ceil(len(budgets) / MOST_COLUMNS))
    shown = budgets[(len(budgets) - 1) % every :: every]
    return [
        {"model": model} | {f"{tokens / 1e6:.3g} M": number(_mean(of_model.get(tokens, ())), ".3f") for tokens in shown}
        for model, of_model in losses.items()
        if shown
    ]


def device_memory_rows(results: Sequence[LearningResult]) -> list[Row]:
    """The most that torch has allocated on its GPU in any step, the output layer included."""
    peaks: dict[str, int] = {}
    for result in results:
        for point in result.training:
            if point.device_peak_bytes is not None:
                peaks[result.model] = max(point.device_peak_bytes, peaks.get(result.model, 0))
    first = next(iter(peaks.values()), None)
    return [{"model": model, "allocated": ratio(peak, first, 1e9, "GB")} for model, peak in peaks.items()]


def _mean(losses: Sequence[float | None]) -> float | None:
    known = [loss for loss in losses if loss is not None]
    return statistics.fmean(known) if known and len(known) == len(losses) else None  # none may be left out
