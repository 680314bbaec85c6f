"""A run of seconds: a corpus of a few thousand characters, a model of a few thousand weights."""

import json
import os
import random
import signal
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from deq_lm.data.encoding import prepare
from deq_lm.data.streams import ContiguousStreams
from deq_lm.modeling import DEQLMForCausalLM, build_config
from deq_lm.structure import build, to_mapping
from deq_lm.training.distillation import load_teacher
from deq_lm.training.identity import Identity, comparable_config
from deq_lm.training.optimizer import make_optimizer
from deq_lm.training.phases import comparable_phases
from deq_lm.training.recipe import Recipe, apply_override
from deq_lm.training.schedules import make_schedule
from deq_lm.training.state import TrainingState
from deq_lm.training.step import train_step


def recipe_mapping(folder: Path) -> dict[str, Any]:
    """A complete recipe, as YAML would give it, of a run in `folder`."""
    return {
        "name": "tiny",
        "seed": 1,
        "data": {
            "corpus": "text",
            "data_dir": str(write_corpus(folder / "text")),
            "tokenizer": "bpe",
            "vocab_size": 300,
            "cache_dir": str(folder / "cache"),
        },
        "model": {
            "cell": {
                "name": "transformer_xl",
                "d_model": 16,
                "num_heads": 2,
                "d_inner": 32,
                "mem_len": 8,
                "dropout": 0.1,
            },
            "stopping": {"max_steps": 6, "rtol": 1.0e-3},
        },
        "training": {
            "output_dir": str(folder / "run"),
            "max_steps": 8,
            "batch_size": 4,
            "segment_length": 8,
            "gradient_accumulation": 2,
            "optimizer": {"name": "adamw", "lr": 0.01, "betas": [0.9, 0.95], "weight_decay": 0.1, "eps": 1.0e-8},
            "schedule": {"name": "cosine", "warmup_steps": 2, "decay_steps": 8, "final_lr_ratio": 0.1},
            "clip_norm": 1.0,
            "phases": [{"until": 0.25, "num_unrolled_steps": 2}],
            "max_steps_jitter": 0,
            "jacobian": {"weight": 0.1, "probability": 0.5, "growth": None},
            "faults": {
                "not_finite": "skip",
                "loss_spike": {"policy": "warn", "limit": 3.0},
                "unconverged_solve": {"policy": "ignore", "limit": 0.5},
                "unconverged_adjoint": {"policy": "warn", "limit": 0.1},
            },
            "mixed_precision": None,
            "log_every": 1,
            "evaluate_every": 4,
            "checkpoint_every": 2,
            "keep_checkpoints": 2,
            "track": False,
        },
        "evaluation": {
            "batch_size": 2,
            "segment_length": 8,
            "causality_cuts": 1,
            "no_op_segments": 0,
            "curve_evaluations": [],
            "unroll_depths": [],
            "sample_tokens": 0,
            "validation_sample_tokens": 0,
        },
    }


def make_recipe(folder: Path, *overrides: str) -> Recipe:
    """The recipe of a run in `folder`, with overrides as on the command line."""
    mapping = recipe_mapping(folder)
    for override in overrides:
        apply_override(mapping, override)
    return build(Recipe, mapping)


def write_corpus(folder: Path) -> Path:
    """Sentences of made-up words as train.txt, valid.txt and test.txt, unless they are there."""
    if folder.exists():
        return folder
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(1, 6))) for _ in range(60)]
    folder.mkdir(parents=True)
    for split, num_lines in {"train": 80, "valid": 6, "test": 6}.items():
        lines = (" ".join(draw.choices(words, k=8)) + ".\n" for _ in range(num_lines))
        (folder / f"{split}.txt").write_text("".join(lines), encoding="utf-8")
    return folder


def make_state(recipe: Recipe, accelerator: Accelerator) -> tuple[TrainingState, Identity, Any]:
    """What `train` sets up before its first step: the state, its identity and the tokenizer."""
    corpus = prepare(recipe.data)
    teacher = load_teacher(recipe.training.distillation, corpus.tokenizer, accelerator.device)
    streams = ContiguousStreams(
        corpus.splits["train"].tokens,
        num_streams=recipe.training.batch_size,
        segment_length=recipe.training.segment_length,
        rank=accelerator.process_index,
        num_ranks=accelerator.num_processes,
        drop_remainder=True,
    )
    torch.manual_seed(recipe.seed)
    model = DEQLMForCausalLM(build_config(recipe.model, vocab_size=len(corpus.tokenizer)))
    optimizer = make_optimizer(model, recipe.training.optimizer)
    schedule = make_schedule(optimizer, recipe.training.schedule, max_steps=recipe.training.max_steps)
    identity = Identity(
        to_mapping(recipe),
        comparable_config(model.config),
        corpus.fingerprint,
        accelerator.num_processes,
        comparable_phases(recipe.training.phases, recipe.training.num_schedule_steps),
        teacher and teacher.sha256,
    )
    return TrainingState(model, optimizer, schedule, streams, teacher=teacher), identity, corpus.tokenizer


def leave_weights_alone(state: TrainingState) -> None:
    """Take the weights from the optimizer, so that a step leaves them and their gradients to be looked at."""
    for group in state.optimizer.param_groups:
        group["params"].clear()


UNEQUAL = ("tokens_per_second", "process_peak_bytes")
"""Metrics that are not the same from run to run."""


def metrics(recipe: Recipe, kind: str) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl of one kind."""
    lines = (Path(recipe.training.output_dir) / "metrics.jsonl").read_text("utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def signal_at_call(monkeypatch, holder, name: str, number: int) -> list[int]:
    """SIGTERM comes with the `number`th call of `holder`.`name`; the list that is returned counts all calls."""
    work, calls = getattr(holder, name), []

    def count_and_work(*args, **kwargs):
        calls.append(len(calls) + 1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return work(*args, **kwargs)

    monkeypatch.setattr(holder, name, count_and_work)
    return calls


@contextmanager
def forward_changed(model, change):
    """`change(output, kwargs)` after every forward pass of `model`."""
    forward = model.forward

    def changed(*args, **kwargs):
        output = forward(*args, **kwargs)
        change(output, kwargs)
        return output

    model.forward = changed
    yield
    model.forward = forward


def not_finite(output, _kwargs) -> None:
    output.nll_nats = output.nll_nats + float("inf")  # the gradient stays finite: the loss itself must be looked at


def one_step(recipe, state, accelerator):
    return train_step(accelerator, state.model, state, recipe, stop_requested=False)


PLAIN = ("training.clip_norm=null", "training.phases=[]", "model.cell.dropout=0.0")
"""Overrides for a step with nothing but its gradient."""
