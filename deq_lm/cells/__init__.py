"""f itself: modules that know neither solver nor loss."""

from deq_lm.cells.base import BoundCell, Cell, CellConfig
from deq_lm.cells.composed import ComposedCell
from deq_lm.cells.memory import Memory, Past, ProjectedMemory
from deq_lm.cells.module_cell import ModuleCell
from deq_lm.cells.monotone import MonotoneCell, MonotoneConfig
from deq_lm.cells.multiscale import CoarseRate, MultiscaleCell, MultiscaleConfig
from deq_lm.cells.transformer_xl import TransformerXLCell, TransformerXLConfig

__all__ = [
    "BoundCell",
    "Cell",
    "CellConfig",
    "CoarseRate",
    "ComposedCell",
    "Memory",
    "ModuleCell",
    "MonotoneCell",
    "MonotoneConfig",
    "MultiscaleCell",
    "MultiscaleConfig",
    "Past",
    "ProjectedMemory",
    "TransformerXLCell",
    "TransformerXLConfig",
]
