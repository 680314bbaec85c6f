"""The suite: which models, and what is measured of them, as one typed value read from one YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from deq_lm.solvers import StoppingRule
from deq_lm.structure import build
from deq_lm.training.strict_yaml import read_yaml


@dataclass(frozen=True)
class ModelConfig:
    """One model of a suite.

    Attributes:
        recipe: its YAML file.
        overrides: settings of the recipe to replace, as on the command line of `scripts/train_lm.py`.
    """

    recipe: str
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class EvaluationSettings:
    """Perplexity and all that `evaluate` measures; needs trained models.

    Attributes:
        split: what to score.
    """

    split: Literal["train", "valid", "test"] = "test"


@dataclass(frozen=True)
class MemorySettings:
    """Peak memory of a training step; needs no trained model.

    Attributes:
        num_evaluations: depths of an unrolled model and budgets of an equilibrium; a stack has its own depth only.
        batch_size: sequences; None is the recipe's.
        segment_length: their length; None is the recipe's.
        mem_len: positions of memory; None is the recipe's.
        vocab_size: for recipes whose vocabulary only the text decides.
        limit_bytes: a step that needs more is stopped and counts as out of memory, before the machine is; None is no
            limit but the device's.
    """

    num_evaluations: tuple[int, ...]
    batch_size: int | None = None
    segment_length: int | None = None
    mem_len: int | None = None
    vocab_size: int | None = None
    limit_bytes: int | None = None

    def __post_init__(self) -> None:
        if not self.num_evaluations or min(self.num_evaluations) < 1:
            raise ValueError(f"num_evaluations={list(self.num_evaluations)}: expected numbers of 1 or more.")
        for name in ("batch_size", "segment_length", "vocab_size", "limit_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected 1 or more, or null.")
        if self.mem_len is not None and self.mem_len < 0:
            raise ValueError(f"mem_len={self.mem_len}: expected 0 (no memory) or more, or null for the recipe's.")


@dataclass(frozen=True)
class CostSettings:
    """Time and floating-point operations of training and scoring; needs trained models.

    Attributes:
        rounds: timed steps of each model, taken in turns.
    """

    rounds: int = 5

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds={self.rounds}: expected 1 or more; 5 or more for a median.")


@dataclass(frozen=True)
class GradientConfig:
    """A way to compute the gradient, where it is not that of training.

    Attributes:
        stopping: of the forward solve; None is that of training.
        adjoint: a section like a recipe's `model.adjoint`; None is the model's.
    """

    stopping: StoppingRule | None = None
    adjoint: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class ConvergenceSettings:
    """How the solves of an equilibrium converge; needs trained models.

    Attributes:
        num_evaluations: budgets at which residuals are measured, rising.
        num_segments: segments of every stream that are solved.
        solvers: names of solvers beside the model's own, with their default settings.
        checkpoints: also measure the contraction at each checkpoint that the run has kept.
        gradients: ways to compute the gradient, by name, whose error is measured beside that of training's.
    """

    num_evaluations: tuple[int, ...] = (1, 2, 3, 5, 8, 12, 17, 24, 31, 48, 96)
    num_segments: int = 4
    solvers: tuple[str, ...] = ("anderson", "picard")
    checkpoints: bool = True
    gradients: Mapping[str, GradientConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        budgets = list(self.num_evaluations)
        if not budgets or budgets[0] < 1 or budgets != sorted(set(budgets)):
            raise ValueError(f"num_evaluations={budgets}: expected rising numbers, from 1 on.")
        if self.num_segments < 2:
            raise ValueError(f"num_segments={self.num_segments}: expected 2 or more; the first has no memory.")


@dataclass(frozen=True)
class Suite:
    """What to measure of which models. A section that is null is left out.

    Attributes:
        name: names the folders of its runs and results.
        models: by the name they have in the report; the first is what times and bytes are compared with.
        overrides: settings to replace in every recipe.
        seeds: a run each.
        train: train the models that have no finished run.
        evaluation, memory, cost, convergence: what to measure.
    """

    name: str
    models: Mapping[str, ModelConfig]
    overrides: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    train: bool = False
    evaluation: EvaluationSettings | None = None
    memory: MemorySettings | None = None
    cost: CostSettings | None = None
    convergence: ConvergenceSettings | None = None

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)}: expected one or more, all different.")


def load_suite(path: Path) -> Suite:
    """The suite in a YAML file.

    Raises:
        ConfigError: it cannot be read, or a setting is unknown, missing, of the wrong type or out of range.
    """
    return build(Suite, read_yaml(path), "suite")
