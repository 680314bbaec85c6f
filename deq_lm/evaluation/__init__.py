"""Measure a trained model: perplexity, causality, memory; the number in the log and the number in the report are one."""

from deq_lm.evaluation.causality import CausalityAudit, audit_causality
from deq_lm.evaluation.comparison import Compared, compare, is_best_by_evidence, model_name, paired_difference
from deq_lm.evaluation.config import EvaluationConfig
from deq_lm.evaluation.document_losses import DocumentLosses, PairedDifference, paired_difference_of_documents
from deq_lm.evaluation.evaluate import evaluate, score_split
from deq_lm.evaluation.loading import load_model, model_folder
from deq_lm.evaluation.perplexity import Perplexity, PerplexityResult, evaluate_perplexity
from deq_lm.evaluation.records import read_record, write_record
from deq_lm.evaluation.report import render
from deq_lm.evaluation.results import EvaluationResult
from deq_lm.evaluation.sample import Decoding, Sample, printable, sample_text, write_text

__all__ = [
    "CausalityAudit",
    "Compared",
    "Decoding",
    "DocumentLosses",
    "EvaluationConfig",
    "EvaluationResult",
    "PairedDifference",
    "Perplexity",
    "PerplexityResult",
    "Sample",
    "audit_causality",
    "compare",
    "evaluate",
    "evaluate_perplexity",
    "is_best_by_evidence",
    "load_model",
    "model_folder",
    "model_name",
    "paired_difference",
    "paired_difference_of_documents",
    "printable",
    "read_record",
    "render",
    "sample_text",
    "score_split",
    "write_record",
    "write_text",
]
