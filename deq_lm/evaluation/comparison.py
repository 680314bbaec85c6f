"""Evaluation results side by side: only what was measured alike; seeds of one recipe as a mean; two of one text paired."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deq_lm.errors import DataError
from deq_lm.evaluation.bootstrap import Interval
from deq_lm.evaluation.document_losses import paired_difference_of_documents
from deq_lm.evaluation.results import EvaluationResult
from deq_lm.modeling import DEQLMConfig, ParameterCount, count_parameters

# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom; for more the last is used, a little too wide
_STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One recipe's runs.

    Attributes:
        name: of the recipe.
        num_seeds: how many runs.
        parameters: of the model.
        training_tokens: targets trained on; None if the recipe is not known.
        nats_per_token, nats_per_word, bits_per_byte: means over the runs.
        interval: half width of the 95 % interval of nats_per_token over seeds; None for a single run.
        document_interval: that of a single run, over documents; None for several, or where there is none.
        evaluations: of the cell, mean in a forward solve; None without a solve.
        share_converged: of the forward solves; None likewise.
        is_causal: of all runs.
    """

    name: str
    num_seeds: int
    parameters: ParameterCount
    training_tokens: int | None
    nats_per_token: float
    nats_per_word: float | None
    bits_per_byte: float | None
    interval: float | None
    document_interval: Interval | None
    evaluations: float | None
    share_converged: float | None
    is_causal: bool

    @property
    def word_perplexity(self) -> float | None:
        """exp of the mean nats per word."""
        return None if self.nats_per_word is None or self.nats_per_word > 700 else math.exp(self.nats_per_word)


def compare(results: Sequence[EvaluationResult]) -> list[Compared]:
    """A row for each recipe, the lowest loss first.

    Raises:
        DataError: the results differ in text, tokens or protocol, or one has no finite loss.
    """
    first = _protocol(results[0])
    for result in results[1:]:
        for what, value in _protocol(result).items():
            if value != first[what]:
                raise DataError(
                    f"{model_name(result)} and {model_name(results[0])} cannot be compared: {what} {value} and "
                    f"{first[what]}. Measure both alike, with eval/evaluate.py and the same data and evaluation settings."
                )
    names = dict.fromkeys(map(model_name, results))
    rows = [_row(name, [result for result in results if model_name(result) == name]) for name in names]
    return sorted(rows, key=lambda row: row.nats_per_token)


def is_best_by_evidence(rows: Sequence[Compared]) -> bool:
    """Whether the first of `compare`'s rows has the lowest loss beyond doubt: its interval and all others are apart."""
    best, *others = rows
    if not others or any(row.interval is None for row in rows):
        return False
    return all(best.nats_per_token + (best.interval or 0) < row.nats_per_token - (row.interval or 0) for row in others)


def paired_difference(results: Sequence[EvaluationResult], name: str, other: str) -> tuple[float, float | None] | None:
    """Nats per token of one model less those of another, run by run of the same seed.

    Runs of a seed begin with the same draws and read the same text in the same order, so that what they share cancels.

    Returns:
        The mean and the half width of its 95 % interval, None for a single pair; None if no seed is common to both.
    """
    losses: dict[str, dict[int, float]] = {name: {}, other: {}}
    for result in results:
        nats = result.perplexity.nats_per_token
        if model_name(result) in losses and nats is not None:
            losses[model_name(result)][result.seed] = nats
    differences = [losses[name][seed] - losses[other][seed] for seed in losses[name].keys() & losses[other].keys()]
    return (statistics.fmean(differences), _interval(differences)) if differences else None


def render_pair(result: EvaluationResult, other: EvaluationResult, *, names: Sequence[str]) -> str:
    """Two results as text: each loss with its interval over documents, and their difference with its own.

    Args:
        result, other: of the same text.
        names: what to call them.

    Raises:
        DataError: they cannot be paired.
    """
    difference = paired_difference_of_documents(result.documents, other.documents)
    lines = []
    for name, each in zip(names, (result, other), strict=True):
        assert each.documents is not None  # they have been paired
        interval = each.documents.interval("model", "num_words")
        lines.append((name, _with_interval(each.perplexity.nats_per_word, interval, ".4f")))
    lines.append(("difference", _with_interval(difference.nats_per_word, difference.interval, "+.4f")))
    width = max(len(name) for name, _ in lines)
    table = [f"{name:<{width}}  {value} nats per word" for name, value in lines]
    if difference.interval is None:
        verdict = "a single document says nothing of others: no intervals"
    else:
        verdict = (
            f"95 % intervals: bootstrap over {difference.num_documents:,} documents, paired for the difference; "
            + ("0 is outside" if difference.is_evident else "0 is inside, so neither is better by this evidence")
        )
    protocols = [_protocol(each) for each in (result, other)]
    unlike = [
        f"CAUTION: {what} {protocols[0][what]} and {protocols[1][what]}"
        for what in ("streams", "segment length", "memory length", "precision")
        if protocols[0][what] != protocols[1][what]
    ]
    return "\n".join([*table, "", verdict, *unlike])


def _with_interval(value: float | None, interval: Interval | None, form: str) -> str:
    assert value is not None  # a loss that is not finite has not been paired
    return format(value, form) + (
        "" if interval is None else f" [{format(interval.low, form)}, {format(interval.high, form)}]"
    )


def model_name(result: EvaluationResult) -> str:
    """What a result's model is called in comparisons."""
    return result.recipe["name"] if result.recipe is not None else str(result.location)


def _protocol(result: EvaluationResult) -> dict[str, Any]:
    return {
        "split": result.split,
        "data fingerprint": result.data_fingerprint,
        "tokens": result.perplexity.num_tokens,
        "words": result.perplexity.num_words,
        "streams": result.evaluation.batch_size,
        "segment length": result.evaluation.segment_length,
        "memory length": result.mem_len,
        "precision": result.precision,
    }


def _row(name: str, results: Sequence[EvaluationResult]) -> Compared:
    losses = [result.perplexity.nats_per_token for result in results]
    if None in losses:
        raise DataError(f"{name}: its loss is not finite, which cannot be compared. Leave it out.")
    solves = [result.solves for result in results if result.solves is not None]
    is_solved = results[0].model["depth"] == "equilibrium" and bool(solves)
    documents = results[0].documents
    return Compared(
        name=name,
        num_seeds=len(results),
        parameters=count_parameters(_config(results[0].model)),
        training_tokens=_training_tokens(results[0].recipe),
        nats_per_token=statistics.fmean(loss for loss in losses if loss is not None),
        nats_per_word=_mean([result.perplexity.nats_per_word for result in results]),
        bits_per_byte=_mean([result.perplexity.bits_per_byte for result in results]),
        interval=_interval([loss for loss in losses if loss is not None]),
        document_interval=documents.interval("model", "num_tokens") if documents and len(results) == 1 else None,
        evaluations=statistics.fmean(solve.mean_evaluations for solve in solves) if is_solved else None,
        share_converged=statistics.fmean(solve.share_converged for solve in solves) if is_solved else None,
        is_causal=all(result.causality.is_causal for result in results),
    )


def _config(model: Mapping[str, Any]) -> DEQLMConfig:
    names = ("vocab_size", "cell", "embedding", "depth", "num_layers")
    return DEQLMConfig(**{name: model[name] for name in names if name in model})


def _training_tokens(recipe: Mapping[str, Any] | None) -> int | None:
    if recipe is None:
        return None
    training = recipe["training"]
    return (
        training["max_steps"] * training["batch_size"] * training["segment_length"] * training["gradient_accumulation"]
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def _interval(values: Sequence[float]) -> float | None:
    """Half width of the 95 % interval of the mean."""
    if len(values) < 2:
        return None
    t = _STUDENT_T[min(len(values) - 1, len(_STUDENT_T)) - 1]
    return t * statistics.stdev(values) / len(values) ** 0.5
