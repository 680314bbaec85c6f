"""Measure a trained model: perplexity, causality, memory; the number in the log and the number in the report are one."""

from deq_lm.evaluation.causality import CausalityAudit, audit_causality
from deq_lm.evaluation.comparison import Compared, compare, comparison_table
from deq_lm.evaluation.config import EvaluationConfig
from deq_lm.evaluation.evaluate import evaluate
from deq_lm.evaluation.perplexity import Perplexity, PerplexityResult, evaluate_perplexity
from deq_lm.evaluation.report import render
from deq_lm.evaluation.results import EvaluationResult, read_result, write_result

__all__ = [
    "CausalityAudit",
    "Compared",
    "EvaluationConfig",
    "EvaluationResult",
    "Perplexity",
    "PerplexityResult",
    "audit_causality",
    "compare",
    "comparison_table",
    "evaluate",
    "evaluate_perplexity",
    "read_result",
    "render",
    "write_result",
]
