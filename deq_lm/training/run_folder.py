"""The run folder: where everything about one run is written, and the refusal to write over another one.

| name | holds |
|---|---|
| recipe.yaml | the resolved recipe, every setting and override |
| versions.json | for each start of the run: its step, versions, machine, commit |
| metrics.jsonl | one JSON line per log step and evaluation |
| tensorboard/ | the same for TensorBoard |
| checkpoints/step_00000100/ | see `deq_lm.training.checkpoint` |
| final/ | the trained model and its tokenizer, for `from_pretrained`; evaluation.json, and README.md, its model card |
| lock | held while a process trains here; names it |
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deq_lm.errors import CheckpointError
from deq_lm.evaluation.records import environment
from deq_lm.training.durable import write_text
from deq_lm.training.recipe import Recipe, recipe_text


@dataclass(frozen=True)
class RunFolder:
    """The places in a run folder."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def versions(self) -> Path:
        return self.path / "versions.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def final(self) -> Path:
        return self.path / "final"

    @property
    def lock_file(self) -> Path:
        return self.path / "lock"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder if it is not there, and keep other runs out; the kernel ends the hold with the process.

        Raises:
            CheckpointError: another run is in it, or it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = open(self.lock_file, "a+", encoding="utf-8")  # noqa: SIM115 - held until the end
        except OSError as error:
            raise self._unwritable(error) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise self._taken() from error
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            yield

    def _refuse_if_locked(self) -> None:
        """A look that does not disturb others who look."""
        if self.lock_file.is_file():
            with open(self.lock_file, encoding="utf-8") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise self._taken() from error

    def _taken(self) -> CheckpointError:
        holder = self.lock_file.read_text("utf-8", errors="replace").strip() or "of unknown process"
        return CheckpointError(
            f"{self.path}: another run is writing to it ({holder}); wait for its end, or set training.output_dir to "
            "another folder."
        )

    def _unwritable(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: cannot be written ({error.strerror}); set training.output_dir to another folder."
        )

    def check(self, *, resume: bool) -> None:
        """Refuse a folder that holds something else, without touching it.

        Raises:
            CheckpointError: it is no folder; another run is writing to it; or it holds files, and the run is not resumed
                or they are no run's.
        """
        if self.path.exists() and not self.path.is_dir():
            raise CheckpointError(f"{self.path}: is a file; set training.output_dir to a folder.")
        self._refuse_if_locked()
        used = self.path.is_dir() and any(path != self.lock_file for path in self.path.iterdir())
        if used and not resume:
            raise CheckpointError(
                f"{self.path}: already holds files, and a run is never overwritten; continue it with --resume, "
                "or set training.output_dir to a new folder."
            )
        if used and not self.recipe.exists():
            raise CheckpointError(
                f"{self.path}: holds files but no recipe.yaml, so it is no run to resume; set "
                "training.output_dir to the folder of the run, or to a new one without --resume."
            )

    def open(self, recipe: Recipe, *, step: int, owed: Collection[str] = ()) -> None:
        """Write what describes the run, and drop metrics that are going to be measured again.

        Args:
            recipe: of the run.
            step: those of later steps go.
            owed: kinds of metrics that go for this step, too.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            for leftover in self.checkpoints.glob(".*"):  # of a save or removal that was killed
                shutil.rmtree(leftover)
            write_text(self.recipe, recipe_text(recipe))
            starts = json.loads(self.versions.read_text("utf-8")) if self.versions.exists() else []
            write_text(self.versions, json.dumps([*starts, {"step": step, **environment()}], indent=1))
            records = ((json.loads(line), line + "\n") for line in self._metrics_lines())
            ends = dict.fromkeys(owed, step - 1)
            kept = [line for record, line in records if record["step"] <= ends.get(record["kind"], step)]
            write_text(self.metrics, "".join(kept))
        except OSError as error:
            raise self._unwritable(error) from error

    def _metrics_lines(self) -> Iterator[str]:
        """The whole lines of metrics.jsonl; a kill can leave a last line without its end."""
        if self.metrics.exists():
            yield from self.metrics.read_text("utf-8").split("\n")[:-1]
