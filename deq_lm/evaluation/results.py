"""One evaluation as a file: everything measured, and everything needed to say on what and with what."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers

from deq_lm.errors import ConfigError, DataError
from deq_lm.evaluation.causality import CausalityAudit
from deq_lm.evaluation.compute_curve import CurvePoint
from deq_lm.evaluation.config import EvaluationConfig
from deq_lm.evaluation.no_op import NoOpCheck
from deq_lm.evaluation.peak_memory import MemoryRow
from deq_lm.evaluation.perplexity import Perplexity
from deq_lm.evaluation.sample import Sample
from deq_lm.evaluation.token_loss import SolveStatistics
from deq_lm.structure import build, to_mapping

SCHEMA_VERSION = 2

PACKAGE_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """What `evaluate` measures.

    Attributes:
        schema_version: of this record.
        created: date and time, ISO 8601, UTC.
        location: the checkpoint or run folder that was measured.
        split: the split that was scored.
        data_fingerprint: of the encoded corpus.
        seed: of the causality audit and the sample.
        precision: of the weights, and so of the computation.
        model: the model's configuration.
        recipe: the settings of the run that made it, as far as they are known.
        evaluation: how it was measured.
        environment: versions, machine, commit.
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
    """

    schema_version: int
    created: str
    location: str | None
    split: str
    data_fingerprint: str
    seed: int
    precision: str
    model: Mapping[str, Any]
    recipe: Mapping[str, Any] | None
    evaluation: EvaluationConfig
    environment: Mapping[str, Any]
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


def write_result(path: Path, result: EvaluationResult) -> None:
    """Write `result` as JSON, with its headline; the file appears complete or not at all.

    Raises:
        DataError: it cannot be written.
    """
    mapping = to_mapping(result)
    ordered = {"schema_version": mapping.pop("schema_version"), "headline": result.headline(), **mapping}
    aside = path.with_name(f".{path.name}.incomplete")
    try:
        with open(aside, "w", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(ordered, indent=1, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise DataError(f"{path}: cannot be written ({error.strerror}). Choose another file.") from error


def read_result(path: Path) -> EvaluationResult:
    """The result in a file that `write_result` wrote.

    Raises:
        DataError: there is no such file, or it is damaged, or of another version.
    """
    try:
        mapping = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file. eval/run.py CHECKPOINT writes one.") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}). Measure again with eval/run.py.") from error
    version = mapping.get("schema_version") if isinstance(mapping, dict) else None
    if version is None:
        raise DataError(f"{path}: is no evaluation result, it has no schema_version. Write one with eval/run.py.")
    if version != SCHEMA_VERSION:
        raise DataError(
            f"{path}: schema_version {version!r}; this deq_lm reads version {SCHEMA_VERSION}. Read it with the deq_lm that "
            "wrote it, or measure again with eval/run.py."
        )
    mapping.pop("headline", None)
    try:
        return build(EvaluationResult, mapping, where="result")
    except ConfigError as error:
        raise DataError(f"{path}: damaged: {error} Measure again with eval/run.py.") from error


def environment() -> dict[str, Any]:
    """What this process runs on: versions of the software, the machine, the commit if the package lies in a clone."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "platform": platform.platform(),
        "cpu": platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of the clone the package lies in, with "+changes" if files differ from it; None outside a clone."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(PACKAGE_ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != PACKAGE_ROOT:
            return None
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
