"""DEQLMConfig: what a checkpoint's config.json says about the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from warnings import warn

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from deq_lm.errors import ConfigError, UnusedSettingWarning
from deq_lm.modeling.builders import (
    adjoint_mapping,
    build_adjoint,
    build_cell_config,
    build_embedding,
    build_solver,
    build_stopping,
    cell_mapping,
    check_solvers,
    embedding_mapping,
    solver_mapping,
)
from deq_lm.solvers import StoppingRule
from deq_lm.structure import build, to_mapping


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The `model` section of a recipe: everything but what the data decide.

    Attributes:
        cell: {"name": "transformer_xl", ...}, the map f; see `deq_lm.modeling.builders.CELLS`.
        embedding: {"name": "full"}, one table, or {"name": "adaptive", "cutoffs": [...], ...}, narrower vectors for rarer
            words; tied. See `deq_lm.modeling.builders.EMBEDDINGS`.
        depth: "equilibrium" solves z = f(z); "unrolled" evaluates f `num_layers` times, with the same parameters; "stack"
            has `num_layers` cells, each with parameters of its own and evaluated once, as an ordinary transformer.
        num_layers: of the unrolled model or the stack; null for an equilibrium.
        solver: {"name": "broyden" | "anderson" | "picard" | "reversible" | "forward_backward" | "peaceman_rachford", ...},
            forward. The last two are for the cell "monotone", here and in an implicit adjoint.
        stopping: forward, in training.
        evaluation_stopping: forward, in evaluation; null is `stopping`.
        adjoint: {"name": "implicit" | "jacobian_free" | "phantom" | "unrolled" | "reversible", ...}. "unrolled"
            backpropagates through the steps of the solver, which has to be "picard", "reversible" or one of the last two;
            "reversible" runs a "reversible" one backwards.
        start: where solves begin: "linear" at a learned map of the embedded tokens (`deq_lm.learned_start`), null at zero.

    Only an equilibrium has a solve: the last five have no effect on the others, and warn if they are not the defaults.
    """

    cell: Mapping[str, Any]
    embedding: Mapping[str, Any] = field(default_factory=lambda: {"name": "full"})
    depth: Literal["equilibrium", "unrolled", "stack"] = "equilibrium"
    num_layers: int | None = None
    solver: Mapping[str, Any] = field(default_factory=lambda: {"name": "broyden"})
    stopping: StoppingRule = field(default_factory=StoppingRule)
    evaluation_stopping: StoppingRule | None = None
    adjoint: Mapping[str, Any] = field(default_factory=lambda: {"name": "implicit"})
    start: Literal["linear"] | None = None


@strict
class DEQLMConfig(PreTrainedConfig):
    """Configuration of `DEQLMForCausalLM`. Sections are plain mappings, resolved here to all their values.

    Attributes: `vocab_size`, those of `ModelSettings`, and two that are None where they are not known. `vocabulary_sha256`
    is of the tokenizer in training (`deq_lm.data.tokenizers.vocabulary_hash`); no other is accepted beside the model.
    `n_ctx` is how many positions attention has seen in training, memory included. Distances are relative, so it is no
    limit, but tools that cut text into windows ask for it by this name. (That of `max_position_embeddings` makes `generate`
    advise against longer text.)

    Raises:
        ConfigError: naming the place and the nearest valid key.
    """

    model_type = "deq_lm"
    attribute_map = {"hidden_size": "d_model"}  # noqa: RUF012  (the library's protocol)
    keys_to_ignore_at_inference = [  # noqa: RUF012  (all but loss and logits: a Trainer gathers these over its batches)
        "nll_nats",
        "num_targets",
        "target_nats",
        "last_hidden_state",
        "hidden_states",
        "memory",
        "past_key_values",
        "solution",
        "jacobian",
        "start_error",
    ]

    vocab_size: int = 32000
    cell: dict | None = None
    embedding: dict | None = None
    depth: str = "equilibrium"
    num_layers: int | None = None
    solver: dict | None = None
    stopping: dict | None = None
    evaluation_stopping: dict | None = None
    adjoint: dict | None = None
    start: str | None = None
    tie_word_embeddings: bool = True
    n_ctx: int | None = None
    vocabulary_sha256: str | None = None
    num_hidden_layers: int = 1
    use_cache: bool | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.depth not in ("equilibrium", "unrolled", "stack"):
            raise ConfigError(f"model.depth: {self.depth!r}; expected 'equilibrium', 'unrolled' or 'stack'.")
        if (self.depth == "equilibrium") != (self.num_layers is None):
            raise ConfigError(
                f"model.depth={self.depth} with num_layers={self.num_layers}: give num_layers to an unrolled model or a "
                "stack, and only to these (an equilibrium has no number of layers; see stopping.max_steps)."
            )
        if self.num_layers is not None and self.num_layers < 1:
            raise ConfigError(f"model.num_layers={self.num_layers}: expected 1 or more evaluations of the cell.")
        if self.use_cache is None:
            self.use_cache = self.depth != "unrolled"
        cell = build_cell_config(self.cell or {"name": "transformer_xl"}, "model.cell")
        if self.depth != "stack" and not cell.reads_input:
            raise ConfigError(
                f"model.cell: one without injection in a model of depth {self.depth}, which starts from zero, would know "
                "nothing of the text. Inject, or take depth=stack, which starts from the embedded tokens."
            )
        self.cell = cell_mapping(cell)
        embedding = build_embedding(self.embedding or {"name": "full"}, "model.embedding")
        self.embedding = embedding_mapping(embedding)
        try:
            embedding.check(self.vocab_size, self.d_model, tied=self.tie_word_embeddings)
        except ValueError as error:
            raise ConfigError(f"model.embedding: {error}") from error
        solver = build_solver(self.solver or {"name": "broyden"}, "model.solver")
        self.solver = solver_mapping(solver)
        self.stopping = to_mapping(build_stopping(self.stopping or {}, "model.stopping"))
        if self.evaluation_stopping is not None:
            self.evaluation_stopping = to_mapping(build_stopping(self.evaluation_stopping, "model.evaluation_stopping"))
        adjoint = build_adjoint(self.adjoint or {"name": "implicit"}, "model.adjoint")
        self.adjoint = adjoint_mapping(adjoint)
        if self.start not in (None, "linear"):
            raise ConfigError(f"model.start: {self.start!r}; expected 'linear', or null for a start at zero.")
        if self.depth != "equilibrium":
            self._warn_of_settings_of_a_solve()
        else:
            check_solvers(cell, solver, adjoint)
            try:
                adjoint.check(solver)
            except ValueError as error:
                raise ConfigError(f"model.adjoint: {error}") from error
        super().__post_init__(**kwargs)

    def _warn_of_settings_of_a_solve(self) -> None:
        defaults = ModelSettings(cell={})
        unused = [
            name
            for name, default in (
                ("solver", solver_mapping(build_solver(defaults.solver, "model.solver"))),
                ("stopping", to_mapping(defaults.stopping)),
                ("evaluation_stopping", None),
                ("start", None),
                ("adjoint", adjoint_mapping(build_adjoint(defaults.adjoint, "model.adjoint"))),
            )
            if getattr(self, name) != default
        ]
        if unused:
            warn(
                f"no effect with model.depth={self.depth}, which solves nothing: model.{', model.'.join(unused)}. Leave "
                "the default, or set depth=equilibrium.",
                UnusedSettingWarning,
            )

    @property
    def d_model(self) -> int:
        """Width of the state."""
        return self._cell["d_model"]

    @property
    def num_attention_heads(self) -> int:
        """Of the cell; 1 where it has no such setting."""
        return self._cell.get("num_heads", 1)

    @property
    def init_std(self) -> float:
        """Standard deviation of the initial weights."""
        return self._cell["init_std"]

    @property
    def mem_len(self) -> int:
        """Positions of memory a segment may attend to."""
        return self._cell["mem_len"]

    @property
    def _cell(self) -> dict[str, Any]:
        assert self.cell is not None  # resolved in __post_init__
        return self.cell


def build_config(mapping: Mapping[str, Any], vocab_size: int, *, eos_token_id: int | None = None) -> DEQLMConfig:
    """The configuration of a recipe's `model` section, strictly: an unknown key names the nearest valid one.

    The token that ends a document, `eos_token_id`, also begins one and stands for padding.

    Raises:
        ConfigError: with the dotted place.
    """
    settings = build(ModelSettings, mapping, "model")
    plain = {key: value for key, value in to_mapping(settings).items() if value is not None}
    special = dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"), eos_token_id)
    return DEQLMConfig(vocab_size=vocab_size, **special, **plain)
