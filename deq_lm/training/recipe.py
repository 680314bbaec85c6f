"""The recipe: everything that decides a run, as one typed value read from one complete YAML file.

`load_recipe("recipes/demo_cpu.yaml", ["training.max_steps=60"])` reads, applies the overrides and checks all
of it before anything is computed or written. There is no inheritance between recipes; `recipe_text` gives
back every setting, so that the file in a run folder says what happened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from warnings import warn

import yaml

from deq_lm.adjoints import Implicit
from deq_lm.data.encoding import DataConfig
from deq_lm.errors import ConfigError, UnusedSettingWarning, in_one_line
from deq_lm.evaluation import EvaluationConfig
from deq_lm.modeling import DEQLMConfig, build_config
from deq_lm.modeling.builders import build_stopping
from deq_lm.structure import build, to_mapping
from deq_lm.training.distillation import DistillationConfig
from deq_lm.training.faults import FaultsConfig
from deq_lm.training.optimizer import OptimizerConfig
from deq_lm.training.phases import JacobianConfig, PhaseConfig, check_phases
from deq_lm.training.schedules import ScheduleConfig
from deq_lm.training.strict_yaml import parse_yaml, read_yaml

ANY_VOCAB_SIZE = 2**31 - 1
"""Stands in for a vocabulary that the data will decide while a model section is only checked: any cutoff fits."""


@dataclass(frozen=True)
class TrainingConfig:
    """How to train. One step is one update of the weights.

    Attributes:
        output_dir: the run folder; must not exist, or be empty, unless the run is resumed.
        max_steps: steps in all.
        batch_size: parallel streams of text, over all processes together.
        segment_length: tokens per stream and forward pass.
        gradient_accumulation: consecutive segments of every stream that make one step.
        optimizer: see `OptimizerConfig`.
        schedule: see `ScheduleConfig`.
        clip_norm: largest global gradient norm, or None for no clipping.
        phases: what goes otherwise than the `model` section says, from the start on; see `PhaseConfig`.
        max_steps_jitter: solver steps by which the budget of a step's solves is cut at most, uniformly drawn for every step
            and process; 0 is none.
        jacobian: Jacobian regularization, or None.
        distillation: a term against a teacher's predictions for the first part of the run, or None.
        faults: what becomes of a step with a numerical fault; see `deq_lm.training.faults`.
        mixed_precision: "bf16" runs the cell under autocast; None leaves it to `accelerate launch`.
        log_every: steps between lines of metrics.
        evaluate_every: steps between evaluations of the validation split, or None.
        checkpoint_every: steps between checkpoints; the last step always leaves one, and so does one of a validation loss
            below all before.
        keep_checkpoints: how many of the newest checkpoints to keep, besides that of the lowest validation loss.
        track: write TensorBoard files as well.
    """

    output_dir: str
    max_steps: int
    batch_size: int
    segment_length: int
    gradient_accumulation: int
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    clip_norm: float | None
    phases: tuple[PhaseConfig, ...]
    max_steps_jitter: int
    jacobian: JacobianConfig | None
    faults: FaultsConfig
    mixed_precision: Literal["bf16"] | None
    log_every: int
    evaluate_every: int | None
    checkpoint_every: int
    keep_checkpoints: int
    track: bool
    distillation: DistillationConfig | None = None

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected at least 1.")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"clip_norm={self.clip_norm}: expected more than 0, or null for no clipping.")
        decay_steps = self.schedule.decay_steps
        if decay_steps is not None and decay_steps < self.max_steps:
            raise ValueError(
                f"schedule.decay_steps={decay_steps}: expected at least max_steps={self.max_steps}, or null; "
                "no schedule is defined after its end."
            )
        if not self.output_dir.strip():
            raise ValueError("output_dir is empty: give the folder the run is written to.")
        if self.max_steps_jitter < 0:
            raise ValueError(f"max_steps_jitter={self.max_steps_jitter}: expected 0 (none) or more.")
        ends = [phase.until for phase in self.phases]
        if ends != sorted(set(ends)):
            raise ValueError(f"phases end at {ends}: expected rising shares of the steps, one phase after the other.")

    @property
    def num_schedule_steps(self) -> int:
        """Steps of the whole schedule, which the run may be stopped before the end of."""
        return self.schedule.decay_steps or self.max_steps


_COUNTS = (
    "max_steps",
    "batch_size",
    "segment_length",
    "gradient_accumulation",
    "log_every",
    "evaluate_every",
    "checkpoint_every",
    "keep_checkpoints",
)


@dataclass(frozen=True)
class Recipe:
    """A run: what is trained on what, how, and how it is measured.

    Attributes:
        name: a short name, for people.
        seed: of the initial weights and the dropout masks, >= 0.
        data: corpus, tokenizer, cache.
        model: the fields of the model's configuration, as `deq_lm.modeling.build_config` takes them.
        training: how to train.
        evaluation: how to measure, during training and at its end.
    """

    name: str
    seed: int
    data: DataConfig
    model: Mapping[str, Any]
    training: TrainingConfig
    evaluation: EvaluationConfig

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed}: expected a whole number from 0 to 2**32 - 1.")
        config = self.model_config  # raises on a wrong section
        adjoints = check_phases(
            self.training.phases,
            num_steps=self.training.num_schedule_steps,
            jitter=self.training.max_steps_jitter,
            jacobian=self.training.jacobian,
            config=config,
        )
        distillation, num_steps = self.training.distillation, self.training.num_schedule_steps
        if distillation is not None and distillation.num_taught_steps(num_steps) == 0:
            warn(
                f"no effect: training.distillation.until={distillation.until} of {num_steps} steps is none. Give a larger "
                "share, or null for the section.",
                UnusedSettingWarning,
            )
        faults = self.training.faults
        tolerances = {
            "unconverged_solve": [build_stopping(config.stopping, "model.stopping").rtol] if adjoints else [],
            "unconverged_adjoint": [adjoint.stopping.rtol for adjoint in adjoints if isinstance(adjoint, Implicit)],
        }
        for name, rtols in tolerances.items():
            if not rtols and faults.policy(name) != "ignore":
                warn(
                    f"no effect in a run without such a solve: training.faults.{name}.policy={faults.policy(name)}. Give "
                    "ignore, or for unconverged_adjoint model.adjoint.name=implicit.",
                    UnusedSettingWarning,
                )
            limit = getattr(faults, name).limit
            if rtols and limit < max(rtols):
                raise ValueError(
                    f"training.faults.{name}.limit={limit}: expected at least the rtol of the stopping rule, "
                    f"{max(rtols)}, at which a solve has converged."
                )

    @property
    def model_config(self) -> DEQLMConfig:
        """The model section with all defaults filled in; of a vocabulary that the text may yet change."""
        return build_config(self.model, vocab_size=self.data.vocab_size or ANY_VOCAB_SIZE)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with overrides such as "training.max_steps=60" applied.

    Raises:
        ConfigError: the file or an override cannot be read, or a setting is unknown, missing, of the wrong
            type or out of range; the message starts with the file or the setting's dotted place.
    """
    mapping = read_yaml(Path(path))
    for override in overrides:
        apply_override(mapping, override)
    return build(Recipe, mapping, "recipe")


def recipe_text(recipe: Recipe) -> str:
    """The complete YAML text of a recipe; `load_recipe` of it gives the same recipe."""
    return yaml.safe_dump(to_mapping(recipe), sort_keys=False, allow_unicode=True)


def apply_override(mapping: dict[str, Any], override: str) -> None:
    """Set in place what "section.key=value" says; whether the key exists is for `build` to find out.

    Raises:
        ConfigError: the text has no '=', or its value is no YAML, or its path leads through a value.
    """
    place, equals, text = override.partition("=")
    keys = place.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"{override!r}: expected section.key=value, for example training.max_steps=60.")
    section = mapping
    for key in keys[:-1]:
        inner = section.get(key)
        if inner is not None and not isinstance(inner, dict):
            raise ConfigError(f"{override!r}: {in_one_line(key)} is a value, not a section with keys.")
        section[key] = section = {} if inner is None else inner
    section[keys[-1]] = parse_yaml(text, where=f"override {in_one_line(place)}")
