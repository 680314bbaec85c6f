"""Measurements: everything a report is made of, by kind, in the order in which models are to be shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from deq_lm.errors import DataError
from deq_lm.evaluation import EvaluationResult, model_name, read_record
from deq_lm.evaluation.records import Record
from deq_lm.suites import ConvergenceResult, CostResult, LearningResult, MemoryResult

R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Measurements:
    """Records with the files they are from.

    Attributes:
        records: in the order given.
    """

    records: tuple[tuple[Path, Record], ...]

    def of(self, kind: type[R]) -> list[R]:
        """All of one kind."""
        return [record for _, record in self.records if isinstance(record, kind)]

    def first(self, kind: type[R]) -> R | None:
        """The first of one kind: where several suites have measured it, the one that plots and headlines are of."""
        return next(iter(self.of(kind)), None)

    def texts(self) -> dict[str, list[EvaluationResult]]:
        """Evaluations by what was scored, in words; only those of one text can be compared."""
        found: dict[str, list[EvaluationResult]] = {}
        by_fingerprint: dict[tuple[str, str], str] = {}
        for result in self.of(EvaluationResult):
            key = result.data_fingerprint, result.split
            if key not in by_fingerprint:
                name = _text_name(result)
                taken = list(by_fingerprint.values())
                by_fingerprint[key] = name if name not in taken else f"{name} ({result.data_fingerprint[:6]})"
            found.setdefault(by_fingerprint[key], []).append(result)
        return found

    def models(self) -> list[str]:
        """Names of all models, in the order in which they first appear; a color each."""
        names: dict[str, None] = {}
        for memory in self.of(MemoryResult):
            names |= dict.fromkeys(row.model for row in memory.rows)
        for cost in self.of(CostResult):
            names |= dict.fromkeys(row.model for row in cost.rows)
        for evaluation in self.of(EvaluationResult):
            names[model_name(evaluation)] = None
        for run in (*self.of(LearningResult), *self.of(ConvergenceResult)):
            names[run.model] = None
        return list(names)


def read_measurements(places: Sequence[Path]) -> Measurements:
    """The records in files, in all .json files of folders, and in the final models of run folders.

    Raises:
        DataError: there is none, or one is damaged, foreign or of another version.
    """
    files: list[Path] = []
    for place in places:
        if (place / "final").is_dir():
            files.append(place / "final" / "evaluation.json")
        elif place.is_dir():
            found = sorted(place.glob("*.json"))
            if not found:
                raise DataError(
                    f"{place}: no .json file in it. Give a folder that eval/run.py wrote, or a finished run."
                )
            files += found
        else:
            files.append(place)
    kinds = (EvaluationResult, LearningResult, ConvergenceResult, MemoryResult, CostResult)
    return Measurements(tuple((file, read_record(file, *kinds)) for file in files))


def _text_name(result: EvaluationResult) -> str:
    data = result.recipe["data"] if result.recipe is not None else {}
    corpus, folder = data.get("corpus", "text"), data.get("data_dir")
    name = Path(folder).name if corpus in ("text", "prepared") and folder else corpus
    return f"{name}, {result.split} split"
