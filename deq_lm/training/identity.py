"""What makes two runs the same: a checkpoint continues the run that wrote it, and is refused by any other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from deq_lm.errors import CheckpointError
from deq_lm.modeling import DEQLMConfig
from deq_lm.modeling.configuration_deq_lm import ModelSettings
from deq_lm.structure import differences, to_mapping

MAY_CHANGE = (
    "num_processes",
    "recipe.name",
    "recipe.model",
    "recipe.data.data_dir",
    "recipe.data.cache_dir",
    "recipe.training.output_dir",
    "recipe.training.max_steps",
    "recipe.training.phases",
    "recipe.training.distillation.teacher",
    "recipe.training.distillation.until",
    "recipe.training.faults",
    "recipe.training.log_every",
    "recipe.training.evaluate_every",
    "recipe.training.checkpoint_every",
    "recipe.training.keep_checkpoints",
    "recipe.training.track",
    "recipe.evaluation",
)
"""Settings a run may be continued with another value of: they decide no update of the weights, or are meant to be raised
(max_steps), or to be given up (faults: the policy that has ended a run), or are compared in another form (the model by its
configuration, data and teacher by a fingerprint, phases and distillation by the steps they end at). `restore` says what
another number of processes means."""

_CONFIG = ("vocab_size", *(setting.name for setting in fields(ModelSettings)))


@dataclass(frozen=True)
class Identity:
    """What a run must have in common with the checkpoint it continues from."""

    recipe: Mapping[str, Any]
    model_config: Mapping[str, Any]
    data_fingerprint: str
    num_processes: int
    phases: tuple[Mapping[str, Any], ...] = ()
    teacher_sha256: str | None = None
    num_taught_steps: int = 0

    def with_defaults(self) -> Identity:
        """Settings of the model that there were not yet when this was saved have the value by default."""
        known = {name: self.model_config[name] for name in _CONFIG if self.model_config.get(name) is not None}
        return replace(self, model_config={**self.model_config, **comparable_config(DEQLMConfig(**known))})


def comparable_config(config: PreTrainedConfig) -> dict[str, Any]:
    """A model's configuration with all defaults filled in, without what the library writes about itself."""
    found = {name: getattr(config, name) for name in _CONFIG}
    return {**found, "evaluation_stopping": found["evaluation_stopping"] or found["stopping"]}


def refuse_differences(path: Path, saved: Identity, current: Identity) -> None:
    """Raises CheckpointError if `saved`, of the checkpoint `path`, is another run, and says in what."""
    found = differences(to_mapping(saved), to_mapping(current), MAY_CHANGE)
    if found:
        raise CheckpointError(
            f"{path}: belongs to another run ({'; '.join(found)}); give the settings it was written with, "
            "or begin a new run in another training.output_dir."
        )
