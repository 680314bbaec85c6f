"""Plain mappings to components: the tables a new solver, adjoint, cell or embedding is added to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from deq_lm.adjoints import Adjoint, Implicit, JacobianFree, Phantom, Reversed, Unrolled
from deq_lm.cells.base import Cell, CellConfig
from deq_lm.cells.composed import ComposedCell
from deq_lm.cells.monotone import MonotoneCell, MonotoneConfig
from deq_lm.cells.multiscale import MultiscaleCell, MultiscaleConfig
from deq_lm.cells.transformer_xl import TransformerXLCell, TransformerXLConfig
from deq_lm.errors import ConfigError
from deq_lm.heads import AdaptiveEmbeddingConfig, EmbeddingConfig, FullEmbeddingConfig
from deq_lm.solvers import (
    Anderson,
    Broyden,
    FixedPointSolver,
    ForwardBackward,
    PeacemanRachford,
    Picard,
    Reversible,
    StoppingRule,
)
from deq_lm.structure import build, choose, to_mapping

SOLVERS: dict[str, type[FixedPointSolver]] = {
    "broyden": Broyden,
    "anderson": Anderson,
    "picard": Picard,
    "reversible": Reversible,
    "forward_backward": ForwardBackward,
    "peaceman_rachford": PeacemanRachford,
}
CELLS: dict[str, tuple[type[CellConfig], type[Cell]]] = {
    "transformer_xl": (TransformerXLConfig, TransformerXLCell),
    "monotone": (MonotoneConfig, MonotoneCell),
    "multiscale": (MultiscaleConfig, MultiscaleCell),
}
EMBEDDINGS: dict[str, type[EmbeddingConfig]] = {"full": FullEmbeddingConfig, "adaptive": AdaptiveEmbeddingConfig}


@dataclass(frozen=True)
class ImplicitSettings:
    """What an `implicit` section may say."""

    solver: Mapping[str, Any] = field(default_factory=lambda: solver_mapping(Implicit().solver))
    stopping: StoppingRule = field(default_factory=lambda: Implicit().stopping)


ADJOINTS: dict[str, type] = {
    "implicit": ImplicitSettings,
    "jacobian_free": JacobianFree,
    "phantom": Phantom,
    "reversible": Reversed,
    "unrolled": Unrolled,
}


def build_solver(mapping: Any, where: str) -> FixedPointSolver:
    """A solver from {"name": ..., its fields}."""
    return choose(SOLVERS, mapping, where)


def build_stopping(mapping: Any, where: str) -> StoppingRule:
    """A stopping rule from its fields."""
    return build(StoppingRule, mapping, where)


def build_adjoint(mapping: Any, where: str) -> Adjoint:
    """An adjoint from {"name": ..., its fields}; `implicit` has sections `solver` and `stopping`."""
    settings = choose(ADJOINTS, mapping, where)
    if isinstance(settings, ImplicitSettings):
        return Implicit(solver=build_solver(settings.solver, f"{where}.solver"), stopping=settings.stopping)
    return settings


def build_cell_config(mapping: Any, where: str) -> CellConfig:
    """A cell's configuration from {"name": ..., its fields}."""
    return choose(_cell_configs(), mapping, where)


def build_cell(config: CellConfig) -> Cell:
    """The cell a configuration describes."""
    (kind,) = [cell for settings, cell in CELLS.values() if type(config) is settings]
    blocks = [kind(config) for _ in range(config.num_blocks)]
    return blocks[0] if len(blocks) == 1 else ComposedCell(config, blocks)


def check_solvers(cell: CellConfig, solver: FixedPointSolver, adjoint: Adjoint) -> None:
    """Raises ConfigError if a solver, the adjoint's included, takes f apart and the cell does not offer its parts."""
    solvers = {"model.solver": solver}
    if isinstance(adjoint, Implicit):
        solvers["model.adjoint.solver"] = adjoint.solver
    for where, each in solvers.items():
        if each.needs_proximal_form and not cell.has_proximal_form:
            raise ConfigError(
                f"{where}: {type(each).__name__} with the cell {type(cell).__name__} of num_blocks={cell.num_blocks}: "
                "expected a monotone cell of one block, f(z) = prox(W z + u). Take model.cell.name=monotone, or a solver "
                "that needs no more of f than its values: broyden, anderson, picard."
            )


def build_embedding(mapping: Any, where: str) -> EmbeddingConfig:
    """How words are embedded and scored, from {"name": ..., its fields}."""
    return choose(EMBEDDINGS, mapping, where)


def solver_mapping(solver: FixedPointSolver) -> dict[str, Any]:
    """The inverse of `build_solver`, complete with defaults."""
    return _named(SOLVERS, solver)


def adjoint_mapping(adjoint: Adjoint) -> dict[str, Any]:
    """The inverse of `build_adjoint`, complete with defaults."""
    if isinstance(adjoint, Implicit):
        return {
            "name": "implicit",
            "solver": solver_mapping(adjoint.solver),
            "stopping": to_mapping(adjoint.stopping),
        }
    return _named(ADJOINTS, adjoint)


def cell_mapping(config: CellConfig) -> dict[str, Any]:
    """The inverse of `build_cell_config`, complete with defaults."""
    return _named(_cell_configs(), config)


def embedding_mapping(config: EmbeddingConfig) -> dict[str, Any]:
    """The inverse of `build_embedding`, complete with defaults."""
    return _named(EMBEDDINGS, config)


def _cell_configs() -> dict[str, type[CellConfig]]:
    return {name: config for name, (config, _) in CELLS.items()}


def _named(table: Mapping[str, type], instance: Any) -> dict[str, Any]:
    (name,) = [name for name, kind in table.items() if type(instance) is kind]
    return {"name": name, **(to_mapping(instance) if fields(instance) else {})}
