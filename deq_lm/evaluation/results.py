"""One evaluation: everything measured of a model, and everything needed to say on what and with what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from deq_lm.evaluation.causality import CausalityAudit
from deq_lm.evaluation.compute_curve import CurvePoint
from deq_lm.evaluation.config import EvaluationConfig
from deq_lm.evaluation.document_losses import DocumentLosses
from deq_lm.evaluation.no_op import NoOpCheck
from deq_lm.evaluation.peak_memory import MemoryRow
from deq_lm.evaluation.perplexity import Perplexity
from deq_lm.evaluation.records import Record
from deq_lm.evaluation.sample import Sample
from deq_lm.evaluation.token_loss import SolveStatistics


@dataclass(frozen=True, kw_only=True)
class EvaluationResult(Record):
    """What `evaluate` measures.

    Attributes:
        location: the checkpoint or run folder that was measured.
        split: the split that was scored.
        data_fingerprint: of the encoded corpus.
        seed: of the causality audit and the sample.
        precision: of the weights, and so of the computation.
        model: the model's configuration.
        recipe: the settings of the run that made it, as far as they are known.
        evaluation: how it was measured.
        perplexity: of the model.
        unigram: of a unigram model of the same tokens, fitted to the training split.
        bigram: of a bigram model, likewise.
        solves: behind the model's perplexity; None if it has none.
        causality: whether the model sees what it predicts.
        no_op: whether the solve matters; None if it was not asked for or the model is no equilibrium.
        curve: loss against evaluations of the cell; empty likewise.
        memory: of a training step, at each depth; empty likewise.
        memory_shape: sequences, their length, and positions of memory of that step.
        sample: text written by the model; None if it was not asked for.
        caveats: what a reader has to know of the text, a sentence each.
        documents: the losses of each document; None if they are not known.
    """

    kind: ClassVar[str] = "evaluation"

    location: str | None
    split: str
    data_fingerprint: str
    seed: int
    precision: str
    model: Mapping[str, Any]
    recipe: Mapping[str, Any] | None
    evaluation: EvaluationConfig
    perplexity: Perplexity
    unigram: Perplexity
    bigram: Perplexity
    solves: SolveStatistics | None
    causality: CausalityAudit
    no_op: NoOpCheck | None
    curve: tuple[CurvePoint, ...]
    memory: tuple[MemoryRow, ...]
    memory_shape: tuple[int, int, int] | None
    sample: Sample | None
    caveats: tuple[str, ...] = ()
    documents: DocumentLosses | None = None

    @property
    def mem_len(self) -> int:
        """Positions of memory it was measured with."""
        return self.model["cell"]["mem_len"] if self.evaluation.mem_len is None else self.evaluation.mem_len

    def headline(self) -> dict[str, Any]:
        """The numbers one looks for first; they follow from the others."""
        names = ("word_perplexity", "token_perplexity", "nats_per_word", "nats_per_token", "bits_per_byte")
        models = {"model": self.perplexity, "bigram": self.bigram, "unigram": self.unigram}
        numbers: dict[str, Any] = {
            model: {name: getattr(perplexity, name) for name in names} for model, perplexity in models.items()
        }
        share_converged = None if self.solves is None else self.solves.share_converged
        return {**numbers, "share_converged": share_converged, "is_causal": self.causality.is_causal}
