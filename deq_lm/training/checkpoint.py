"""Checkpoints: everything the next step depends on, in a folder that is complete and unaltered, or not used.

A folder `step_00000100` is written aside, sealed by `manifest.json` (size and SHA-256 of every file), synced and
renamed. A crash at any moment leaves the older ones as they were. Neither safetensors nor `torch.load` notices a
flipped bit, and Accelerate's `save_state` writes in place: hence a format of our own.

| file | holds |
|---|---|
| config.json, model.safetensors, tokenizer files | the model, as `from_pretrained` reads it |
| optimizer.pt | the optimizer's state, read with `weights_only=True` |
| state.json | recipe, data fingerprint, number of processes, progress, schedule |
| rank_00000.json, rank_00000.safetensors | of one process: stream position, metrics so far, memories, random state |
| manifest.json | size and SHA-256 of all the others |
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from deq_lm.cells.memory import Memory
from deq_lm.errors import CheckpointError
from deq_lm.modeling import DEQLMForCausalLM
from deq_lm.structure import build, to_mapping
from deq_lm.training.durable import begin_folder, publish_folder, remove_folder, write_text
from deq_lm.training.export import save_model, save_pickle, save_tensors
from deq_lm.training.identity import Identity, refuse_differences
from deq_lm.training.random_state import random_state_of_all, set_random_state, try_random_state
from deq_lm.training.sharding import load_optimizer_state, load_weights, whole_model, whole_optimizer_state
from deq_lm.training.state import Progress, TrainingState
from deq_lm.training.tracking import Interval

MANIFEST = "manifest.json"

logger = logging.getLogger(__name__)


def save(
    folder: Path,
    state: TrainingState,
    identity: Identity,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    *,
    keep: int,
) -> Path:
    """Write `folder`/step_XXXXXXXX together with all other processes, then remove all but the best and the `keep` newest.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written; older checkpoints are as they were.
    """
    path = folder / _name(state.progress.step)
    best = None if state.progress.best_step is None else _name(state.progress.best_step)
    aside = path.with_name(f".{path.name}.incomplete")
    try:
        if accelerator.is_main_process:
            begin_folder(path)
        accelerator.wait_for_everyone()
        _write_own_files(aside, state, accelerator.process_index)
        model, optimizer = whole_model(state.model), whole_optimizer_state(state.optimizer)
        if accelerator.is_main_process:
            _write_shared_files(aside, state, model, optimizer, identity, tokenizer)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_manifest(aside)
            publish_folder(aside, path)
            for old in _folders(folder)[keep:]:
                if old.name != best:
                    remove_folder(old)
        accelerator.wait_for_everyone()
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            f"{path}: could not be written ({error}); the checkpoints before it are intact. Free some space, "
            "then continue with --resume."
        ) from error
    return path


def warn_of_little_space(folder: Path, model: DEQLMForCausalLM, *, keep: int) -> None:
    """Log a warning if the disk has no room for all checkpoints that will be in `folder` at once, and the final model.

    Counted are the weights and Adam's two moments of them, which are nearly all of a checkpoint.
    """
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    num_checkpoints = keep + 2  # the best besides, and the one being written
    needed = num_checkpoints * 3 * weights + weights
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free
    if there + free < needed:
        logger.warning(
            "%s: its disk has %.3g GB free, and up to %d checkpoints of %.3g GB each and the final model will take %.3g GB "
            "more. Free some space, or lower training.keep_checkpoints.",
            folder,
            free / 1e9,
            num_checkpoints,
            3 * weights / 1e9,
            (needed - there) / 1e9,
        )


def newest_complete(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` that is complete and unaltered; damaged ones are logged and passed over.

    Returns:
        None if there is no checkpoint at all, damaged or not.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    problems = []
    for path in _folders(folder):
        problem = damage(path)
        if problem is None:
            return path
        logger.warning("checkpoint passed over: %s", problem)
        problems.append(problem)
    if problems:
        raise CheckpointError(
            f"{folder}: no checkpoint is complete ({'; '.join(problems)}); restore one from a copy, or start again "
            "in a new training.output_dir."
        )
    return None


def restore(path: Path, state: TrainingState, identity: Identity, *, rank: int) -> None:
    """Put `state`, and this process's random generators, where they were when `path` was saved.

    By another number of processes than wrote it, the same streams are continued in the same order: their memory is dealt
    anew, as the streams are. Random numbers are drawn anew, from the seed, the step and the rank, so that with dropout or
    regularization the run is another one than it would have been.

    Raises:
        CheckpointError: the checkpoint is of another recipe, model, vocabulary or data, each difference named; or a file
            holds what cannot be loaded, though its hash is right. Nothing has been changed.
    """
    shared = _read_shared(path, state, identity)
    saved = shared.identity
    device = next(state.model.parameters()).device
    is_dealt_anew = saved.num_processes != identity.num_processes
    files = [_read_own(path, other) for other in (range(saved.num_processes) if is_dealt_anew else [rank])]
    streams_each = identity.recipe["training"]["batch_size"] // saved.num_processes
    memory, teacher_memory = (
        _memory_of([own.tensors for own in files], name, streams_each, device, path) for name in state.memories
    )

    with _named(path / "rank_*.json"):
        state.streams.load_state_dict(files[0].streams)  # raises before it changes anything
    load_weights(state.model, path / "model.safetensors")
    load_optimizer_state(state.optimizer, shared.optimizer)
    state.schedule.load_state_dict(dict(shared.schedule))
    state.progress = shared.progress
    if not is_dealt_anew:
        state.interval, state.memory, state.teacher_memory = files[0].interval, memory, teacher_memory
        set_random_state(files[0].random, files[0].tensors)
        return
    logger.warning(
        "%s was written by %d process(es), and this run has %d: the streams go on, dealt anew, with other random numbers",
        path,
        saved.num_processes,
        identity.num_processes,
    )
    pooled = Interval.pooled([own.interval for own in files])
    state.interval = pooled if rank == 0 else pooled.without_solves()
    state.memory, state.teacher_memory = (
        whole and whole.share(rank, identity.num_processes) for whole in (memory, teacher_memory)
    )
    sequence = np.random.SeedSequence([identity.recipe["seed"], shared.progress.step, rank])
    set_seed(int(sequence.generate_state(1)[0]))


@dataclass(frozen=True)
class _Shared:
    """What `_write_shared_files` wrote beside the weights; found to fit the run."""

    identity: Identity
    progress: Progress
    schedule: Mapping[str, Any]
    optimizer: Mapping[str, Any]


@dataclass(frozen=True)
class _Own:
    """What `_write_own_files` wrote."""

    streams: Mapping[str, int]
    interval: Interval
    random: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def _read_shared(path: Path, state: TrainingState, identity: Identity) -> _Shared:
    """Raises CheckpointError, naming file and place, for anything that could not be loaded into `state`."""
    with _named(path / "state.json"):
        content = _read_json(path / "state.json")
        saved = build(Identity, content["identity"], "identity").with_defaults()
        progress = build(Progress, content["progress"], "progress")
        schedule, current = content["schedule"], state.schedule.state_dict()
        if not isinstance(schedule, dict) or _layout(schedule) != _layout(current):
            raise ValueError("schedule: is of another kind")
    refuse_differences(path, saved, identity)
    with _named(path / "model.safetensors"):
        with safe_open(path / "model.safetensors", "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        ties = state.model.all_tied_weights_keys
        own = {name: tuple(p.shape) for name, p in state.model.state_dict().items() if name not in ties}
        _refuse_other_shapes(shapes, own)
    with _named(path / "optimizer.pt"):
        optimizer = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
        groups = state.optimizer.param_groups
        found = [len(group["params"]) for group in optimizer["param_groups"]]
        if found != [len(group["params"]) for group in groups]:
            raise ValueError(f"groups of {found} parameters: expected {[len(group['params']) for group in groups]}")
        parameters = [parameter for group in groups for parameter in group["params"]]
        for i, moments in optimizer["state"].items():
            for name, value in moments.items():
                if isinstance(value, Tensor) and value.dim() > 0 and value.shape != parameters[i].shape:
                    raise ValueError(
                        f"{name} of parameter {i}: shape {tuple(value.shape)}; expected {tuple(parameters[i].shape)}"
                    )
    return _Shared(saved, progress, schedule, optimizer)


def _read_own(path: Path, rank: int) -> _Own:
    """Raises CheckpointError likewise."""
    name = path / f"rank_{rank:05d}.json"
    with _named(name):
        content = _read_json(name)
        streams = build(_Place, content["streams"], "streams")
        interval = build(Interval, content["interval"], "interval")
    with _named(name.with_suffix(".safetensors")):
        tensors = load_file(name.with_suffix(".safetensors"))
        random_state = content["random"]
        try_random_state(random_state, tensors)
    return _Own(to_mapping(streams), interval, random_state, tensors)


@dataclass(frozen=True)
class _Place:
    """Of streams, as their `state_dict` says it."""

    epoch: int
    segment: int


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Any failure to understand `file` as a CheckpointError that names it."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{file}: is not what a checkpoint of this run holds ({reason}). Take another checkpoint, or begin a new run."
        ) from error


def _read_json(path: Path) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number")

    return json.loads(path.read_text("utf-8"), parse_constant=refuse)


def _layout(value: Any) -> Any:
    """The kinds of plain data, without the values."""
    if isinstance(value, dict):
        return {name: _layout(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_layout(item) for item in value]
    return "number" if isinstance(value, int | float) else type(value).__name__


def _refuse_other_shapes(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    for name in sorted({*found, *expected}):
        if found.get(name) != expected.get(name):
            there, here = (shapes.get(name, "nothing") for shapes in (found, expected))
            raise ValueError(f"{name}: {there} there, {here} here")


def _memory_of(
    files: Sequence[Mapping[str, Tensor]], kind: str, streams_each: int, device: torch.device, path: Path
) -> Memory | None:
    """The memory of this kind in the tensors of some ranks, their streams one after the other."""
    with _named(path / "rank_*.safetensors"):
        # Copied also where there is one: safetensors' tensors are not aligned, and that changes the last bits of a sum.
        remembered = {
            name: torch.cat([tensors[f"{kind}.{name}"].clone() for tensors in files]).to(device)
            for name in ("z", "x", "mask", "num_tokens")
            if f"{kind}.{name}" in files[0]
        }
        memory = Memory(**remembered) if remembered else None
        if memory is not None and not (
            memory.z.dim() == memory.x.dim() == 3
            and memory.z.shape[:2] == memory.x.shape[:2]
            and len(memory.z) == streams_each * len(files)
        ):
            raise ValueError(
                f"{kind} of shapes {tuple(memory.z.shape)} and {tuple(memory.x.shape)}: expected "
                f"{streams_each * len(files)} streams"
            )
    return memory


def write_manifest(folder: Path) -> None:
    """Seal `folder`: list the size and SHA-256 of every file in it."""
    write_text(folder / MANIFEST, json.dumps({"files": _list_files(folder)}, indent=1))


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, naming the first such file; None if they are as they were written."""
    try:
        recorded = json.loads((path / MANIFEST).read_text("utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{path / MANIFEST}: missing or unreadable"
    found = _list_files(path)
    for name in sorted({*recorded, *found}):
        if name not in found:
            return f"{path / name}: missing"
        if name not in recorded:
            return f"{path / name}: not in the manifest"
        if recorded[name] != found[name]:
            return f"{path / name}: differs from its size or SHA-256 in the manifest"
    return None


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _folders(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if re.fullmatch(r"step_\d{8,}", path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def _list_files(folder: Path) -> dict[str, dict[str, Any]]:
    listing = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            listing[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    return listing


def _write_shared_files(
    folder: Path,
    state: TrainingState,
    model: DEQLMForCausalLM,
    optimizer: Mapping[str, Any],
    identity: Identity,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    save_model(folder, model, tokenizer)
    save_pickle(folder / "optimizer.pt", optimizer)
    shared = {
        "identity": to_mapping(identity),
        "progress": to_mapping(state.progress),
        "schedule": state.schedule.state_dict(),
    }
    write_text(folder / "state.json", json.dumps(shared, indent=1, allow_nan=False))


def _write_own_files(folder: Path, state: TrainingState, rank: int) -> None:
    random_state, tensors = random_state_of_all()
    for kind, memory in state.memories.items():
        for name in ("z", "x", "mask", "num_tokens"):
            if (tensor := getattr(memory, name, None)) is not None:
                tensors[f"{kind}.{name}"] = tensor.contiguous()
    save_tensors(folder / f"rank_{rank:05d}.safetensors", tensors)
    own = {
        "streams": state.streams.state_dict(),
        "interval": to_mapping(state.interval),
        "random": random_state,
    }
    write_text(folder / f"rank_{rank:05d}.json", json.dumps(own))
