"""Subject: a model of a suite with one seed, its recipe and the folder of its run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from deq_lm.data.encoding import PREPARED, EncodedCorpus, prepare
from deq_lm.errors import CheckpointError, ConfigError
from deq_lm.evaluation.loading import load_model
from deq_lm.modeling import DEQLMForCausalLM, build_config
from deq_lm.structure import differences, nearest, to_mapping
from deq_lm.suites.config import ModelConfig, Suite
from deq_lm.training.recipe import Recipe, load_recipe
from deq_lm.training.run_folder import RunFolder

DECIDES_NO_WEIGHT = (
    "name",
    "data.data_dir",
    "data.cache_dir",
    "training.output_dir",
    "training.log_every",
    "training.evaluate_every",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.track",
    "evaluation",
)
"""Settings in which a run may differ from what is asked for, and still be it."""


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        name: of the model, in the report.
        recipe: with the seed in it.
        run: its folder, which need not be there.
    """

    name: str
    recipe: Recipe
    run: RunFolder

    @property
    def seed(self) -> int:
        return self.recipe.seed

    @property
    def label(self) -> str:
        """Unlike that of any other subject; names files."""
        return f"{self.name}_{self.seed}"

    @property
    def is_trained(self) -> bool:
        return (self.run.final / "config.json").is_file()

    def untrained(self, device: torch.device, *, vocab_size: int | None = None) -> DEQLMForCausalLM:
        """The model with random weights.

        Args:
            device: where to.
            vocab_size: where the recipe leaves it to the text.

        Raises:
            ConfigError: it is not known.
        """
        vocab_size = self.recipe.data.vocab_size or vocab_size
        if vocab_size is None:
            raise ConfigError(
                f"{self.name}: its vocabulary is known when its text has been read. Give memory.vocab_size."
            )
        torch.manual_seed(self.seed)
        model = DEQLMForCausalLM(build_config(self.recipe.model, vocab_size))
        nn.Module.to(model, device)
        return model

    def trained(self, device: torch.device, *, folder: Path | None = None) -> DEQLMForCausalLM:
        """The model of the finished run, or of one of its checkpoints.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        self.check_is_trained()
        model, _ = load_model(self.run.final if folder is None else folder)
        nn.Module.to(model, device)
        return model

    def check_is_trained(self) -> None:
        """Raise if there is no finished run.

        Raises:
            CheckpointError: there is none.
        """
        if not self.is_trained:
            raise CheckpointError(
                f"{self.run.path}: no finished run of {self.name} with seed {self.seed}. Train it, or run the suite with "
                "--train."
            )

    def corpus(self) -> EncodedCorpus:
        """The text of the recipe by the tokenizer of the run.

        Raises:
            CheckpointError: there is none.
        """
        self.check_is_trained()
        data = self.recipe.data
        if data.corpus != PREPARED:
            data = replace(data, tokenizer=str(self.run.final), vocab_size=None)
        return prepare(data)


def subjects_of(
    suite: Suite, *, models: Sequence[str] = (), seeds: Sequence[int] = (), overrides: Sequence[str] = (), runs: Path
) -> list[Subject]:
    """The models of a suite with each seed, or those that are asked for.

    Args:
        suite: the models.
        models: names of some of them; or recipes (.yaml) or run folders, in place of them, as PATH or NAME=PATH.
        seeds: instead of the suite's; a run folder has its own.
        overrides: settings to replace in every recipe, after the suite's; what a model of the suite sets for itself stays.
        runs: the folder whose NAME_SEED are the runs of models given by a recipe.

    Raises:
        ConfigError: an unknown name, no models, two of one name and seed, or a recipe that cannot be read.
        CheckpointError: a run folder has another recipe than it should.
    """
    chosen = [_choose(suite, text) for text in models] or list(suite.models.items())
    if not chosen:
        raise ConfigError(
            f"suite {suite.name}: has no models of its own. Give some, for example --models runs/demo_cpu."
        )
    found = []
    for name, model in chosen:
        if isinstance(model, ModelConfig):
            settings = [*suite.overrides, *overrides, *model.overrides]
            found += [_by_recipe(name, model.recipe, settings, seed, runs) for seed in seeds or suite.seeds]
        else:
            recipe = load_recipe(model / "recipe.yaml", overrides)
            found.append(Subject(name or recipe.name, recipe, RunFolder(model)))
    labels = [subject.label for subject in found]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"two models {label}. Give one of them another name, for example --models other=PATH.")
    return found


def _choose(suite: Suite, text: str) -> tuple[str, ModelConfig | Path]:
    if text in suite.models:
        return text, suite.models[text]
    name, _, place = text.rpartition("=")
    path = Path(place)
    if path.is_dir():
        return name, path
    if path.suffix == ".yaml":
        return name or path.stem, ModelConfig(str(path))
    raise ConfigError(
        f"--models {text}: no recipe (.yaml), no run folder, and no model of the suite {suite.name}"
        f"{nearest(text, suite.models)}"
    )


def _by_recipe(name: str, path: str, overrides: Sequence[str], seed: int, runs: Path) -> Subject:
    run = RunFolder(runs / f"{name}_{seed}")
    recipe = load_recipe(path, [*overrides, f"seed={seed}"])
    recipe = replace(recipe, training=replace(recipe.training, output_dir=str(run.path)))
    if run.recipe.is_file():
        there = differences(to_mapping(load_recipe(run.recipe)), to_mapping(recipe), DECIDES_NO_WEIGHT)
        if there:
            raise CheckpointError(
                f"{run.path}: is of another recipe ({'; '.join(there)}). Give the same settings, or another --runs."
            )
    elif run.final.exists():
        raise CheckpointError(
            f"{run.path}: has a final model and no {run.recipe.name}, so that nobody knows what it was trained by. Remove "
            "the folder, or give another --runs."
        )
    return Subject(name, recipe, run)
