"""Measurements as files: JSON of a stated kind and version, complete or not there, refused if foreign or damaged."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import accelerate
import torch
import transformers

from deq_lm.errors import ConfigError, DataError
from deq_lm.structure import build, to_mapping

SCHEMA_VERSION = 3

PACKAGE_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Record:
    """What every measurement says of itself; subclasses add what was measured.

    Attributes:
        schema_version: of the file.
        created: date and time, ISO 8601, UTC.
        environment: versions, machine, commit.
    """

    kind: ClassVar[str]

    schema_version: int
    created: str
    environment: Mapping[str, Any]

    def headline(self) -> Mapping[str, Any]:
        """Numbers to begin the file with, which follow from the others."""
        return {}


R = TypeVar("R", bound=Record)


def provenance() -> dict[str, Any]:
    """The fields of `Record` for a measurement made here and now."""
    return {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
    }


def check_output(path: Path) -> None:
    """Find out before a measurement what `write_record` would find out after it.

    Raises:
        DataError: there is no such folder, or something is there that is no file, such as a device.
    """
    if not path.parent.is_dir():
        raise DataError(f"{path.parent}: no such folder. Give an --output in one that exists.")
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: is there, and is no file that could be replaced. Give another --output.")


def write_record(path: Path, record: Record) -> None:
    """Write `record` as JSON; the file appears complete or not at all.

    Raises:
        DataError: it cannot be written.
    """
    mapping = to_mapping(record)
    first = {"kind": record.kind, "schema_version": mapping.pop("schema_version")}
    headline = {"headline": record.headline()} if record.headline() else {}
    aside = path.with_name(f".{path.name}.incomplete")
    try:
        with open(aside, "w", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps({**first, **headline, **mapping}, indent=1, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise DataError(f"{path}: cannot be written ({error.strerror}). Choose another file.") from error


def read_record(path: Path, *kinds: type[R]) -> R:
    """The record in a file that `write_record` wrote, of one of `kinds`.

    Raises:
        DataError: there is no such file, or it is damaged, of another kind or of another version.
    """
    by_name: Mapping[str, type[R]] = {kind.kind: kind for kind in kinds}
    expected = " or ".join(by_name)
    mapping = _read_json(path)
    version = mapping.get("schema_version") if isinstance(mapping, dict) else None
    if version is None:
        raise DataError(f"{path}: is no measurement, it has no schema_version. Expected one of kind {expected}.")
    if version != SCHEMA_VERSION:
        raise DataError(
            f"{path}: schema_version {version!r}; this deq_lm reads version {SCHEMA_VERSION}. Read it with the deq_lm that "
            "wrote it, or measure again."
        )
    kind = mapping.pop("kind", None)
    if kind not in by_name:
        raise DataError(f"{path}: a measurement of kind {kind!r}; expected {expected}.")
    mapping.pop("headline", None)
    try:
        return build(by_name[kind], mapping, where=kind)
    except ConfigError as error:
        raise DataError(f"{path}: damaged: {error} Measure again.") from error


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


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file. eval/run.py and eval/evaluate.py write them.") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}). Measure again.") from error


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
