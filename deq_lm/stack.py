"""Stack: the same cells as the layers of an ordinary transformer, each with weights of its own and evaluated once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from deq_lm.cells.base import Cell
from deq_lm.cells.memory import Memory, Past, ProjectedMemory
from deq_lm.equilibrium import SegmentOutput


class Stack(nn.Module):
    """h_0 = x, h_l = f_l(h_{l-1}): what an equilibrium is compared with at equal parameters.

    Every layer attends to what it was given in the segments before (h_{l-1}); with cells that have no injection this is
    Transformer-XL.

    References:
        Dai et al. 2019, "Transformer-XL", section 3.2.
    """

    adjoint_solution = None  # of a solve, as `Equilibrium` has it

    def __init__(self, cells: Sequence[Cell]) -> None:
        super().__init__()
        self.cells = nn.ModuleList(cells)

    def forward(
        self,
        x: Tensor,
        memory: Past | None = None,
        *,
        key_mask: Tensor | None = None,
        sliding: bool = False,
        **of_a_solve: Any,
    ) -> SegmentOutput:
        """One segment.

        Args:
            x: (B, L, D).
            memory: of the segment before.
            key_mask: (B, L) bool, False at padding.
            sliding: see `Cell.bind`.
            of_a_solve: refused, unless None or False; `Equilibrium.forward` takes them.

        Raises:
            ValueError: if asked for something that only a solve has.
        """
        given = [name for name, value in of_a_solve.items() if value not in (None, False)]
        if given:
            raise ValueError(
                f"{', '.join(given)}: a stack of layers solves nothing. Leave it out, or use an equilibrium."
            )
        first, *_ = self._cells()
        h, remembered, kept = first.as_state(x), [], []
        parts = [None] * len(self.cells) if memory is None else memory.parts(len(self.cells))
        for cell, part in zip(self._cells(), parts, strict=True):
            f = cell.bind(x, part, key_mask, sliding=sliding)
            if sliding:
                kept.append(cell.keep(f, h, x, part))
            elif cell.mem_len > 0:
                assert part is None or isinstance(part, Memory)
                remembered.append(cell.remember(f, h, x, part))
            h = f(h)
        return SegmentOutput(
            first.read_out(h),
            Memory.joined(remembered) if remembered else None,
            solution=None,
            past=ProjectedMemory.joined(kept) if kept else None,
        )

    def _cells(self) -> list[Cell]:
        return [cell for cell in self.cells if isinstance(cell, Cell)]
