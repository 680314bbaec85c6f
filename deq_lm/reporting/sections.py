"""The sections of a report: their words, tables and plots, or what to run where something was not measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from deq_lm.evaluation import EvaluationResult, compare, model_name
from deq_lm.evaluation.records import Record
from deq_lm.reporting.headline import headline_rows
from deq_lm.reporting.learning import device_memory_rows, training_rows, validation_rows
from deq_lm.reporting.measurements import Measurements
from deq_lm.reporting.plots import PLOTS
from deq_lm.reporting.published import Published
from deq_lm.reporting.scale import ScalePoint, families
from deq_lm.reporting.solves import budget_rows, gradient_rows, guarantee_rows, two_start_rows
from deq_lm.reporting.table import Row, Table, in_units, number, ratio, within
from deq_lm.structure import differences
from deq_lm.suites import DECIDES_NO_WEIGHT, ConvergenceResult, CostResult, LearningResult, MemoryResult
from deq_lm.suites.gradient_error import CLOSE


@dataclass(frozen=True)
class Plot:
    """A figure, the name of its file, and what it shows, in words."""

    name: str
    figure: Figure
    caption: str


@dataclass(frozen=True)
class Section:
    """Attributes:
    title: its heading.
    text: a paragraph each.
    tables, plots: what it shows.
    """

    title: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()


def sections_of(
    measurements: Measurements, published: Published | None = None, notes: Mapping[str, str] | None = None
) -> list[Section]:
    """All sections, in order.

    Args:
        measurements: what to show.
        published: numbers to show beside them.
        notes: what a model taught, by its name; with them the settings are shown in which the models differ from the
            first of them, and nothing by scale: models that differ in more than size and tokens are no curve.

    Raises:
        DataError: results of one text were not measured alike.
    """
    made = [
        _headline(measurements, next(iter(notes), None) if notes else None),
        _differences(measurements, notes),
        _published(published),
        _memory(measurements),
        None if notes else _scale(measurements),
        _learning(measurements),
        _compute(measurements),
        _convergence(measurements),
        _guarantees(measurements),
        _cost(measurements),
        _missing(measurements),
        _provenance(measurements),
    ]
    return [section for section in made if section is not None]


def published_rows(published: Published) -> list[Row]:
    """The papers' numbers as a table."""
    return [
        {
            "model": model.model,
            "parameters, M": number(model.parameters_m, "g"),
            "outside embedding, M": number(model.outside_m, "g"),
            "perplexity per word": number(model.perplexity, "g"),
            "memory, GB": number(model.memory_gb, "g"),
            "time": number(model.time, "g"),
            "evaluations": number(model.evaluations, "d"),
            "source": model.source,
            "recipe here": model.recipe or "-",
        }
        for model in published.models
    ]


def _headline(measurements: Measurements, rival: str | None) -> Section | None:
    texts = measurements.texts()
    if not texts:
        return None
    tables, protocols = [], []
    cuts = [result.causality.num_cuts for results in texts.values() for result in results]
    for name, results in texts.items():
        first = results[0]
        tables.append(Table(name, _without_empty(headline_rows(measurements, results, rival=rival))))
        words = "" if first.perplexity.num_words is None else f", {first.perplexity.num_words:,} words"
        protocols.append(
            f"{name}: {first.perplexity.num_tokens:,} tokens{words}, each token scored once; {first.evaluation.batch_size} "
            f"streams, segments of {first.evaluation.segment_length}, memory of {first.mem_len}, {first.precision}; bigram "
            f"(interpolated Kneser-Ney) {number(first.bigram.nats_per_token, '.3f')}, unigram "
            f"{number(first.unigram.nats_per_token, '.3f')} nats per token."
        )
    explanation = (
        "Means over the runs, with the 95 % interval of the mean; of a single run, in brackets, that over the documents of "
        "the text, which says nothing of other seeds. An asterisk marks the lowest loss only if its interval "
        "and all others are apart; without one no model is better than another by this evidence. Differences are of nats "
        "per token, paired by seed. Activations are the most bytes recorded for a backward pass at any time of a training "
        "step, and in brackets their ratio to the first model's of the suite; times likewise. Evaluations: of the cell in "
        "a solve when scoring, mean. Causal: by the audit of each run, of "
        f"{min(cuts)} to {max(cuts)} sequences cut once each."
    )
    return Section("Models side by side", [*protocols, explanation], tables)


def _differences(measurements: Measurements, notes: Mapping[str, str] | None) -> Section | None:
    texts = measurements.texts()
    if notes is None or not texts:
        return None
    results = next(iter(texts.values()))
    by_name = {model_name(result): result for result in results}
    first = next((by_name[name] for name in notes if name in by_name), results[0])
    rows = []
    for row in compare(results):
        own = by_name[row.name]
        rows.append(
            {
                "model": row.name,
                "differs in": "what the others are compared with" if own is first else "; ".join(_settings(first, own)),
                "nats per token": number(row.nats_per_token, ".3f"),
                "what it taught": notes.get(row.name, "-"),
            }
        )
    return Section("What each differs in", (), [Table(f"differences from {model_name(first)}", rows)])


def _settings(first: EvaluationResult, own: EvaluationResult) -> list[str]:
    """In words, without what follows from another difference."""
    found = differences(first.recipe or {}, own.recipe or {}, _OF_A_RUN)
    if own.model["depth"] != first.model["depth"]:
        told = ("model.depth", "model.num_layers", "model.cell", "training.optimizer", "training.jacobian")
        return [difference for difference in found if difference.startswith(told)]
    if any(difference.startswith("model.adjoint.name") for difference in found):  # the other one has other settings
        return [line for line in found if not (line.startswith("model.adjoint.") and line.endswith(" null here"))]
    return found


_OF_A_RUN = (*DECIDES_NO_WEIGHT, "seed", "data.tokenizer", "data.vocab_size", "model.evaluation_stopping")
"""Settings of a recipe that tell runs apart, and decide nothing of what they learn."""


def _published(published: Published | None) -> Section | None:
    if published is None:
        return None
    sources = [f"{name}: {source}." for name, source in published.sources.items()]
    text = (
        "WikiText-103 at word level, test split; none of these is a result of ours. A perplexity per token of another "
        "tokenizer cannot be compared with them. Of memory and time only ratios within one source can be compared."
    )
    return Section("Published numbers", [text, " ".join(sources)], [Table("published", published_rows(published))])


def _memory(measurements: Measurements) -> Section | None:
    results = measurements.of(MemoryResult)
    if not results:
        return None
    tables = []
    for result in results:
        rows = [
            {
                "model": row.model + (", regularized" if row.regularized else ""),
                "evaluations or layers": str(row.num_evaluations),
                "activations kept": "out of memory" if row.at_peak is None else in_units(row.most_activations, 1e6),
                "solver": in_units(row.most_solver, 1e6),
                "peak without embedding": in_units(row.at_peak and row.at_peak.without_embedding, 1e6),
                "largest sum": in_units(row.largest, 1e6),
                "allocator": in_units(row.allocated, 1e6),
            }
            for row in result.rows
        ]
        title = (
            f"{result.suite}: {result.batch_size} sequences of {result.segment_length}, memory of {result.mem_len}, "
            f"{result.device}; MB"
        )
        tables.append(Table(title, _without_empty(rows)))
    text = (
        "One training step: forward, backward, clipping, optimizer. Activations kept are the most bytes made by the cell "
        "while its operations are recorded for a backward pass; an implicit gradient records one evaluation, inside the "
        "backward pass. The peak counts tensors alive at the same time, with parameters, gradients and the optimizer's "
        "state, and as in the papers without those of the embedding; what kernels use inside is not seen."
    )
    return Section(
        "Memory of a training step", [text], tables, _plots(measurements, "memory_against_depth", "memory_parts")
    )


def _scale(measurements: Measurements) -> Section | None:
    lines = families(measurements)
    if not lines:
        return None
    budgets = sorted({point.tokens for points in lines.values() for point in points})

    def rows(value: Callable[[ScalePoint], str]) -> list[Row]:
        return [
            {"kind": kind, "parameters": f"{size:,}"}
            | {f"{tokens / 1e6:.2g} M tokens": "-" for tokens in budgets}
            | {f"{point.tokens / 1e6:.2g} M tokens": value(point) for point in points}
            for (kind, size), points in lines.items()
        ]

    tables = [
        Table("test loss, nats per token", rows(lambda point: number(point.nats, ".3f") + within(point.interval)))
    ]
    if any(point.operations is not None for points in lines.values() for point in points):
        tables.append(Table("10^12 operations of training", rows(lambda point: in_units(point.operations, 1e12))))
    text = "Every number of tokens has a schedule of its own, whose rate falls to its end."
    return Section("Scale", [text], tables, _plots(measurements, "loss_against_scale"))


def _learning(measurements: Measurements) -> Section | None:
    results = measurements.of(LearningResult)
    if not results:
        return None
    text = (
        "Seconds are steps times the time of one, measured in turns: runs may have shared their machine. Validation losses "
        "are of the part of the validation text that the recipe scores during training. Training losses are means over the "
        "steps since the run last logged, of text that is new to the model in the first pass over it. A dash is a run that "
        "ended before."
    )
    tables = [
        Table("validation loss, nats per token, after so many tokens", validation_rows(results)),
        Table("training loss, nats per token, just before so many tokens", training_rows(results)),
        Table("most memory allocated on the GPU", device_memory_rows(results)),
    ]
    return Section(
        "Learning", [text], [table for table in tables if table.rows], _plots(measurements, "learning_curves")
    )


def _compute(measurements: Measurements) -> Section | None:
    plots = _plots(measurements, "loss_against_evaluations")
    text = "A model whose loss is the same after one evaluation needs no solver."
    return Section("What an evaluation is worth", [text], (), plots) if plots else None


def _convergence(measurements: Measurements) -> Section | None:
    results = measurements.of(ConvergenceResult)
    if not results:
        return None
    budget = max(result.settings.num_evaluations[-1] for result in results)
    text = (
        "Two starts: every segment is solved from the model's own start and from random states of the equilibrium's size, "
        f"with {budget} evaluations; an equilibrium is one if both end in the same state."
    )
    tables = [
        Table("two starts, and the Jacobian at the end", two_start_rows(results)),
        Table("nats per token after so many evaluations", budget_rows(results)),
    ]
    if gradients := gradient_rows(results):
        text += (
            " Gradients are those of the loss of one segment of all streams, against the exact one: of the same weights in "
            f"float64, both solves to {CLOSE.rtol:g}."
        )
        tables.append(Table("error of the gradient", gradients))
    names = "residual_against_evaluations", "residual_by_position", "contraction_over_training"
    return Section("Convergence", [text], tables, _plots(measurements, *names))


def _guarantees(measurements: Measurements) -> Section | None:
    rows = guarantee_rows(measurements.of(ConvergenceResult))
    text = (
        "What is proved for all weights and texts of a cell z = prox(W z + u) with I - W >= m I, m > 0: there is one "
        "equilibrium, and each step brings a splitting nearer to it by the certified rate at least. Beside it the worst of "
        "what was measured, in float64, from zero."
    )
    return Section("Guarantees", [text], [Table("certified, and the worst that was measured", rows)]) if rows else None


def _cost(measurements: Measurements) -> Section | None:
    results = measurements.of(CostResult)
    if not results:
        return None
    tables = []
    for result in results:
        first = result.rows[0]
        rows = [
            {
                "model": row.model,
                "training step": ratio(row.training_seconds, first.training_seconds, 1e-3, "ms"),
                "MFLOP per token": number(row.training_flops_per_token / 1e6, ".1f"),
                "over the run": number(row.training_flops / 1e6, ".1f"),
                "evaluations": number(row.training_evaluations, ".1f"),
                "adjoint evaluations": number(row.adjoint_evaluations, ".1f"),
                "scoring a segment": ratio(row.inference_seconds, first.inference_seconds, 1e-3, "ms"),
                "MFLOP per token scored": number(row.inference_flops_per_token / 1e6, ".2f"),
                "evaluations in scoring": number(row.inference_evaluations, ".1f"),
            }
            for row in result.rows
        ]
        title = f"{result.suite}: {_machine(result)}, median of {result.settings.rounds} rounds in turns"
        tables.append(Table(title, rows))
    text = (
        "Operations are those of matrix products, counted in a training step after the shallow phases, and over the run "
        "with them."
    )
    return Section("Cost", [text], tables, _plots(measurements, "cost_frontier"))


def _missing(measurements: Measurements) -> Section | None:
    commands: dict[type[Any], str] = {
        EvaluationResult: "losses: python eval/run.py perplexity --models RUN...",
        MemoryResult: "memory: python eval/run.py peak_memory",
        CostResult: "time and operations: python eval/run.py speed --models RUN...",
        ConvergenceResult: "convergence: python eval/run.py convergence --models RUN...",
    }
    missing = [text for kind, text in commands.items() if not measurements.of(kind)]
    return Section("Not measured", missing) if missing else None


def _provenance(measurements: Measurements) -> Section:
    rows = [
        {
            "file": path.name,
            "kind": record.kind,
            "created": record.created,
            "commit": _commit(record),
            "torch": str(record.environment.get("torch")),
            "transformers": str(record.environment.get("transformers")),
            "machine": _machine(record),
        }
        for path, record in measurements.records
    ]
    return Section(
        "Where the numbers come from",
        ["Each file also holds the resolved recipes and settings."],
        [Table("files", rows)],
    )


def _plots(measurements: Measurements, *names: str) -> list[Plot]:
    """Those of `names` that there is something to show in."""
    made = [(name, *PLOTS[name]) for name in names]
    return [Plot(name, figure, caption) for name, draw, caption in made if (figure := draw(measurements)) is not None]


def _without_empty(rows: Sequence[Row]) -> list[Row]:
    """The rows without the columns that say nothing."""
    return [{name: cell for name, cell in row.items() if any(other[name] != "-" for other in rows)} for row in rows]


def _commit(record: Record) -> str:
    commit, plus, changes = str(record.environment.get("commit") or "-").partition("+")
    return commit[:12] + plus + changes


def _machine(record: Record) -> str:
    environment = record.environment
    threads = environment.get("torch_threads")
    return ", ".join(environment.get("gpus") or [f"{environment.get('cpu')}, {threads} thread" + "s" * (threads != 1)])
