"""An evaluation result as plain text, at most 100 columns wide (a path is never broken)."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence

from deq_lm.evaluation.causality import CAUSAL_BELOW_NATS, CausalityAudit
from deq_lm.evaluation.document_losses import DocumentLosses
from deq_lm.evaluation.results import EvaluationResult
from deq_lm.evaluation.sample import printable

WIDTH = 100
LABEL_WIDTH = 20


def render(result: EvaluationResult) -> str:
    """The table that ends a training run and that eval/evaluate.py prints."""
    sections = [
        _heading(result),
        _perplexities(result),
        [line for lines in (_protocol(result), _solves(result), _causality(result.causality)) for line in lines],
        _no_op(result),
        _curve(result),
        _memory(result),
        _sample(result),
        _origin(result),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def _heading(result: EvaluationResult) -> list[str]:
    scored = result.perplexity
    words = "-" if scored.num_words is None else f"{scored.num_words:,}"
    return [f"{result.split.capitalize()} split: {scored.num_tokens:,} tokens, {words} words, each token scored once"]


def _perplexities(result: EvaluationResult) -> list[str]:
    models = {"this model": result.perplexity, "bigram": result.bigram, "unigram": result.unigram}
    rows = [
        ("", "perplexity", "perplexity", "nats", "nats", "bits"),
        ("", "per word", "per token", "per word", "per token", "per byte"),
    ]
    for name, perplexity in models.items():
        values = (
            _number(perplexity.word_perplexity, ",.2f"),
            _number(perplexity.token_perplexity, ",.2f"),
            _number(perplexity.nats_per_word, ".4f"),
            _number(perplexity.nats_per_token, ".4f"),
            _number(perplexity.bits_per_byte, ".4f"),
        )
        rows += [(name, *values), *_intervals(result.documents, _NAMES[name])]
    notes = _of_intervals(result.documents) + _item(
        "", "bigram (interpolated Kneser-Ney) and unigram: of the training split's tokens"
    )
    warning = (
        [] if result.causality.is_causal else _item("", "NOT CAUSAL: the perplexity of this model has seen the future")
    )
    return _table(rows) + notes + warning


_NAMES = {"this model": "model", "bigram": "bigram", "unigram": "unigram"}
"""Of the models in `DocumentLosses`."""


def _intervals(documents: DocumentLosses | None, model: str) -> list[tuple[str, ...]]:
    """Two rows, where the intervals of each column begin and end; none without intervals."""
    if documents is None:
        return []
    per_token, per_word, per_byte = (documents.interval(model, per) for per in ("num_tokens", "num_words", "num_bytes"))
    if per_token is None or per_word is None or per_byte is None:
        return []

    def row(label: str, token: float, word: float, byte: float) -> tuple[str, ...]:
        perplexities = (_number(None if nats > 700 else math.exp(nats), ",.2f") for nats in (word, token))
        nats = (f"{value:.4f}" for value in (word, token, byte / math.log(2)))
        return (label, *perplexities, *nats)

    return [
        row("  95 % from", per_token.low, per_word.low, per_byte.low),
        row("       to", per_token.high, per_word.high, per_byte.high),
    ]


def _of_intervals(documents: DocumentLosses | None) -> list[str]:
    if documents is None:
        return []
    if len(documents) < 2:
        return _item("", "no intervals: the text is a single document, and they are drawn from documents")
    return _item("", f"95 % intervals: bootstrap over the {len(documents):,} documents of the text")


def _protocol(result: EvaluationResult) -> list[str]:
    streams, length = result.evaluation.batch_size, result.evaluation.segment_length
    text = f"{streams} streams, segments of {length}, memory of {result.mem_len}, {result.precision}"
    cautions = [line for caveat in result.caveats for line in _item("CAUTION", caveat)]
    return _item("measured with", text) + cautions


def _solves(result: EvaluationResult) -> list[str]:
    model, solves = result.model, result.solves
    if solves is None:
        return _item("depth", f"a stack of {model['num_layers']} layers")
    residuals = (
        f"relative: median {_number(solves.median_residual, '.1e')}, 95 % {_number(solves.residual_95, '.1e')}, "
        f"largest {_number(solves.max_residual, '.1e')}"
    )
    if model["depth"] == "unrolled":
        depth = f"unrolled, {model['num_layers']} layers of the same weights"
        return _item("depth", depth) + _item("residual", residuals)
    solver, stopping = model["solver"], model["evaluation_stopping"] or model["stopping"]
    method = (
        f"{solver['name']}, {solver.get('scope', 'prefix')} scope, at most {stopping['max_steps']} steps, "
        f"rtol {stopping['rtol']:g}, atol {stopping['atol']:g}"
    )
    evaluations = (
        f"mean {solves.mean_evaluations:.1f}, most {solves.max_evaluations}, in {solves.num_solves:,} solves "
        "(a segment of a stream each)"
    )
    others = ", ".join(f"{count:,} {name}" for name, count in sorted(solves.outcomes.items()) if name != "converged")
    converged = f"{100 * solves.share_converged:.1f} % of solves" + (f"; the others: {others}" if others else "")
    lines = {"solver": method, "evaluations": evaluations, "converged": converged, "residual": residuals}
    return [line for label, text in lines.items() for line in _item(label, text)]


def _causality(audit: CausalityAudit) -> list[str]:
    verdict = "causal" if audit.is_causal else "NOT CAUSAL"
    comparison = (
        f"{verdict}: other text after a cut changes an earlier log-probability by at most "
        f"{_number(audit.max_change_nats, '.2g')} nats (mean {_number(audit.mean_change_nats, '.2g')}; limit "
        f"{CAUSAL_BELOW_NATS:g}; {audit.num_cuts} cuts)"
    )
    bias = (
        f"text after it changes the loss of a token by {_number(audit.mean_bias_nats, '+.1e')} +- "
        f"{_number(audit.bias_standard_error_nats, '.1e')} nats on average"
    )
    return _item("causality", comparison) + _item("", bias)


def _no_op(result: EvaluationResult) -> list[str]:
    check = result.no_op
    if check is None:
        return []
    text = (
        f"the solve ends {_number(check.distance, '.2f')} of its norm away from the first evaluation; "
        f"{_number(check.nats_per_token, '.3f')} nats per token instead of {_number(check.first_nats_per_token, '.3f')} "
        f"(on {check.num_tokens:,} tokens)"
    )
    return _item("no-op check", text)


def _curve(result: EvaluationResult) -> list[str]:
    if not result.curve:
        return []
    numbers = [
        ("evaluations", *(str(point.num_evaluations) for point in result.curve)),
        ("nats per token", *(_number(point.nats_per_token, ".3f") for point in result.curve)),
    ]
    heading = _item("compute at test", f"the solve stopped early, on {result.curve[0].num_tokens:,} tokens")
    return heading + [f"{row[0]:<{LABEL_WIDTH}}" + "".join(f"{cell:>8}" for cell in row[1:]) for row in numbers]


def _memory(result: EvaluationResult) -> list[str]:
    rows = result.memory
    if result.memory_shape is None or not rows:
        return []
    sequences, length, mem_len = result.memory_shape
    shape = f"{sequences} sequence of {length} tokens and {mem_len} of memory, without the output layer"
    equilibrium, unrolled = [row.equilibrium_bytes for row in rows], [row.unrolled_bytes for row in rows]
    equilibrium_peak = [row.equilibrium_peak_bytes for row in rows]
    unrolled_peak = [row.unrolled_peak_bytes for row in rows]
    table = [
        ("MB, by evaluations", *(str(row.depth) for row in rows)),
        ("saved for backward", *[""] * len(rows)),
        ("  equilibrium", *map(_megabytes, equilibrium)),
        ("  unrolled", *map(_megabytes, unrolled)),
        ("  ratio", *map(_ratio, unrolled, equilibrium)),
        ("peak of live tensors", *[""] * len(rows)),
        ("  equilibrium", *map(_megabytes, equilibrium_peak)),
        ("  unrolled", *map(_megabytes, unrolled_peak)),
        ("  ratio", *map(_ratio, unrolled_peak, equilibrium_peak)),
    ]
    return _item("memory", f"of one training step: {shape}") + _table(table)


def _sample(result: EvaluationResult) -> list[str]:
    if result.sample is None:
        return []
    prompt = f", after '{printable(result.sample.prompt)}'" if result.sample.prompt else ""
    heading = _item(
        "sample", f"temperature {result.evaluation.sample_temperature:g}{prompt}; blank lines in a row are one"
    )
    blank_lines_merged = re.sub(r"\n\s*\n", "\n\n", printable(result.sample.text).strip("\n"))
    lines = (part for line in blank_lines_merged.split("\n") for part in textwrap.wrap(line, WIDTH - 4) or [""])
    return heading + [f"  | {line}".rstrip() for line in lines]


def _origin(result: EvaluationResult) -> list[str]:
    machine = result.environment
    versions = f"torch {machine['torch']}, transformers {machine['transformers']}, python {machine['python']}"
    lines = _item("software", f"commit {machine['commit'] or 'unknown'}; {versions}") + _item("seed", str(result.seed))
    if result.location is not None:
        lines.append(f"{'model':<{LABEL_WIDTH}}{printable(result.location)}")
    return lines


def _item(label: str, text: str) -> list[str]:
    """A labelled paragraph."""
    lines = textwrap.wrap(text, WIDTH - LABEL_WIDTH, break_long_words=True) or [""]
    return [f"{label if i == 0 else '':<{LABEL_WIDTH}}{line}".rstrip() for i, line in enumerate(lines)]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells, the first flush left and the others flush right."""
    lines = ("".join([f"{row[0]:<{LABEL_WIDTH + 2}}", *(f"{cell:>13}" for cell in row[1:])]) for row in rows)
    return [line.rstrip() for line in lines]


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.3f}"


def _ratio(larger: int, smaller: int) -> str:
    return f"{larger / smaller:.2f}"
