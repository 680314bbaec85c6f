"""Suites: several models, and what to measure of all of them alike."""

from deq_lm.suites.config import Suite, load_suite
from deq_lm.suites.convergence import ConvergenceResult
from deq_lm.suites.cost import CostResult
from deq_lm.suites.dry_run import dry_run
from deq_lm.suites.learning import LearningResult
from deq_lm.suites.memory import MemoryResult
from deq_lm.suites.run import run_suite
from deq_lm.suites.subjects import DECIDES_NO_WEIGHT, Subject, subjects_of

__all__ = [
    "DECIDES_NO_WEIGHT",
    "ConvergenceResult",
    "CostResult",
    "LearningResult",
    "MemoryResult",
    "Subject",
    "Suite",
    "dry_run",
    "load_suite",
    "run_suite",
    "subjects_of",
]
