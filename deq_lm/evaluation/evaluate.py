"""evaluate(): all that is measured of a model, in order; the end of a training run and eval/evaluate.py both call it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from deq_lm.data.documents import Documents
from deq_lm.data.encoding import EncodedCorpus, EncodedSplit
from deq_lm.evaluation.causality import audit_causality
from deq_lm.evaluation.compute_curve import compute_curve
from deq_lm.evaluation.config import EvaluationConfig
from deq_lm.evaluation.document_losses import DocumentLosses, sums_of_documents
from deq_lm.evaluation.modes import device_of, measuring, remembering
from deq_lm.evaluation.ngram import Bigram, Unigram
from deq_lm.evaluation.no_op import check_no_op
from deq_lm.evaluation.peak_memory import MemoryRow, memory_against_depth
from deq_lm.evaluation.perplexity import PerplexityResult, evaluate_perplexity
from deq_lm.evaluation.records import provenance
from deq_lm.evaluation.results import EvaluationResult
from deq_lm.evaluation.sample import sample_text
from deq_lm.modeling import DEQLMForCausalLM


def evaluate(
    model: DEQLMForCausalLM,
    corpus: EncodedCorpus,
    config: EvaluationConfig,
    *,
    split: str = "test",
    scored: PerplexityResult | None = None,
    seed: int = 0,
    location: str | None = None,
    recipe: Mapping[str, Any] | None = None,
) -> EvaluationResult:
    """Measure a model on a split, all of it, in the precision of its weights and in one process.

    Args:
        model: not wrapped; left as it was found.
        corpus: encoded with the model's tokenizer.
        config: how to measure; `max_segments` has no part in it.
        split: what to score.
        scored: what `score_split` has found for it, in several processes; None is to score it here.
        seed: of the causality audit and the sample.
        location: the checkpoint or run folder, for the record.
        recipe: the settings of the run, for the record.

    Raises:
        DataError: the split is too short for the causality audit.
    """
    measured = corpus.splits[split]
    result = score_split(model, measured, config) if scored is None else scored
    vocab_size = model.config.vocab_size
    train_tokens = corpus.splits["train"].tokens
    ngrams = {
        name: kind.fit(train_tokens, vocab_size).nll_nats(measured.tokens)
        for name, kind in (("unigram", Unigram), ("bigram", Bigram))
    }
    baselines = {name: replace(result.perplexity, nll_nats=float(nats.sum())) for name, nats in ngrams.items()}
    with remembering(model, config.mem_len):
        is_equilibrium = model.config.depth == "equilibrium"
        memory, memory_shape = _memory(model, measured.tokens, config) if is_equilibrium else ((), None)
        return EvaluationResult(
            **provenance(),
            location=location,
            split=split,
            data_fingerprint=corpus.fingerprint,
            seed=seed,
            precision=str(next(model.parameters()).dtype).removeprefix("torch."),
            model=json.loads(model.config.to_json_string(use_diff=False)),
            recipe=recipe,
            evaluation=config,
            perplexity=result.perplexity,
            unigram=baselines["unigram"],
            bigram=baselines["bigram"],
            solves=result.solves,
            causality=audit_causality(model, measured.tokens, config, seed=seed),
            no_op=check_no_op(model, measured.tokens, config) if is_equilibrium and config.no_op_segments else None,
            curve=tuple(compute_curve(model, measured.tokens, config)) if is_equilibrium else (),
            memory=memory,
            memory_shape=memory_shape,
            sample=sample_text(model, corpus.tokenizer, config, seed=seed) if config.sample_tokens else None,
            caveats=corpus.caveats,
            documents=_documents(measured.documents, result, ngrams),
        )


def score_split(
    model: DEQLMForCausalLM, split: EncodedSplit, config: EvaluationConfig, accelerator: Accelerator | None = None
) -> PerplexityResult:
    """`evaluate_perplexity` of all of the split, whatever `config.max_segments` says."""
    return evaluate_perplexity(model, split, replace(config, max_segments=None), accelerator)


def _documents(
    documents: Documents | None, result: PerplexityResult, ngrams: Mapping[str, np.ndarray]
) -> DocumentLosses | None:
    """The losses of each document, of the model and of n-gram models, whose nats are those of each target."""
    if documents is None:
        return None
    found = {"model": result.document_nats} if result.perplexity.nll_nats is not None else {}
    return DocumentLosses(
        fingerprint=documents.fingerprint,
        num_tokens=tuple(documents.num_tokens.tolist()),
        num_words=tuple(documents.num_words.tolist()),
        num_bytes=tuple(documents.num_bytes.tolist()),
        nll_nats=found | {name: sums_of_documents(nats, documents.ends) for name, nats in ngrams.items()},
    )


def _memory(
    model: DEQLMForCausalLM, tokens: np.ndarray, config: EvaluationConfig
) -> tuple[tuple[MemoryRow, ...], tuple[int, int, int] | None]:
    """Rows for one stream, the second segment of the split with the memory of the first, and their shape."""
    if not config.unroll_depths:
        return (), None
    length = min(config.segment_length, len(tokens) // 2)
    text = torch.from_numpy(np.array(tokens[: 2 * length], dtype=np.int64))[None].to(device_of(model))
    with measuring(model):
        memory = model(text[:, :length], return_logits=False).memory
    rows = memory_against_depth(model, text[:, length:], config.unroll_depths, memory=memory)
    return tuple(rows), (1, length, 0 if memory is None else memory.length)
