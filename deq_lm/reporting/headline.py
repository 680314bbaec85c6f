"""The table that says it all: losses, memory and cost of the models of one text, a row each."""

from __future__ import annotations

from collections.abc import Sequence

from deq_lm.evaluation import Compared, EvaluationResult, compare, is_best_by_evidence, paired_difference
from deq_lm.reporting.measurements import Measurements
from deq_lm.reporting.plots import own_memory
from deq_lm.reporting.table import Row, number, ratio, within
from deq_lm.suites import CostResult, MemoryResult


def headline_rows(
    measurements: Measurements, results: Sequence[EvaluationResult], *, rival: str | None = None
) -> list[Row]:
    """The table that says it all: a model a row, the lowest loss first.

    Args:
        measurements: bytes and times.
        results: losses, of one text.
        rival: the model to say the difference to; None is the first there is.
    """
    cost_result, memory_result = measurements.first(CostResult), measurements.first(MemoryResult)
    costs = {row.model: row for row in (cost_result.rows if cost_result else ())}
    base_cost = cost_result.rows[0].training_seconds if cost_result else None
    base_memory = own_memory(measurements, memory_result.rows[0].model, results) if memory_result else None
    rows = []
    compared = compare(results)
    names = {row.name for row in compared}
    rival = next((name for name in (rival, *measurements.models()) if name in names), "")
    best = compared[0] if is_best_by_evidence(compared) else None
    for row in compared:
        cost, memory = costs.get(row.name), own_memory(measurements, row.name, results)
        rows.append(
            {
                "model": row.name + (" *" if row is best else ""),
                "parameters": f"{row.parameters.total:,}",
                "outside embedding": f"{row.parameters.other:,}",
                "tokens trained on": number(row.training_tokens, ",d"),
                "runs": str(row.num_seeds),
                "nats per word": number(row.nats_per_word, ".3f"),
                "perplexity per word": number(row.word_perplexity, ",.1f"),
                "nats per token": number(row.nats_per_token, ".3f") + _interval_of(row),
                f"difference to {rival}": "-" if row.name == rival else _difference(results, row.name, rival),
                "bits per byte": number(row.bits_per_byte, ".3f"),
                "evaluations": number(row.evaluations, ".1f"),
                "converged": number(row.share_converged, ".1%"),
                "activations": ratio(
                    memory and memory.most_activations, base_memory and base_memory.most_activations, 1e6, "MB"
                ),
                "training step": ratio(cost and cost.training_seconds, base_cost, 1e-3, "ms"),
                "MFLOP per training token": number(cost and cost.training_flops / 1e6, ".1f"),
                "causal": "yes" if row.is_causal else "NO",
            }
        )
    return rows


def _interval_of(row: Compared) -> str:
    """Over seeds, or of a single run over documents."""
    if row.interval is not None:
        return within(row.interval)
    documents = row.document_interval
    return "" if documents is None else f" (documents: {documents.low:.3f} to {documents.high:.3f})"


def _difference(results: Sequence[EvaluationResult], name: str, rival: str) -> str:
    found = paired_difference(results, name, rival)
    if found is None:
        return "-"
    mean, interval = found
    return f"{mean:+.3f}" + within(interval)
