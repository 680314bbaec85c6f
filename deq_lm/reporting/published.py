"""The papers' numbers, with their sources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deq_lm.structure import build
from deq_lm.training.strict_yaml import read_yaml


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """One model as published. None is what its source does not say.

    Attributes:
        model: its name.
        depth: "equilibrium", "unrolled" or "stack".
        parameters_m: in millions.
        outside_m: of them outside the embedding.
        perplexity: per word, test split.
        memory_gb: of training.
        time: of a training step, relative.
        evaluations: budget of the forward solve in training, or unrolled steps.
        source: a key of `Published.sources`.
        recipe: of this project, that is meant to reproduce it.
    """

    model: str
    depth: str
    parameters_m: float
    outside_m: float | None = None
    perplexity: float
    memory_gb: float | None = None
    time: float | None = None
    evaluations: int | None = None
    source: str
    recipe: str | None = None


@dataclass(frozen=True)
class Published:
    """Published models of one data set.

    Attributes:
        sources: papers and repositories, by a short name.
        models: the rows.
    """

    sources: Mapping[str, str]
    models: tuple[PublishedModel, ...]

    def __post_init__(self) -> None:
        for model in self.models:
            if model.source not in self.sources:
                raise ValueError(
                    f"models: {model.model!r} has the source {model.source!r}; expected one of {', '.join(self.sources)}."
                )


def read_published(path: Path) -> Published:
    """The models in a YAML file.

    Raises:
        ConfigError: it cannot be read, or says something unknown.
    """
    return build(Published, read_yaml(path), "published")
