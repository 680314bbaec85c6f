"""What an operator splitting has to know of f: f(z) = prox_h(W z + u) with I - W >= m I, by its parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from deq_lm._types import FixedPointMap
from deq_lm.solvers.map_contract import CheckedMap


class ProximalForm(Protocol):
    """f by its parts: W linear, u constant, h closed and convex. All states are (B, L, ...).

    f(z) = z says 0 in F(z) + dh(z) with F(z) = (I - W) z - u.
    """

    def __call__(self, z: Tensor, /) -> Tensor:
        """f(z)."""
        ...

    @property
    def margin(self) -> float:
        """m > 0 with <z, (I - W) z> >= m ||z||^2 for all z, and for all prefixes and sequences alike."""
        ...

    @property
    def lipschitz(self) -> Tensor | float:
        """L >= ||I - W||, a constant likewise."""
        ...

    def affine(self, z: Tensor, /) -> Tensor:
        """W z + u; one evaluation."""
        ...

    def prox(self, argument: Tensor, step: Tensor | float, /) -> Tensor:
        """prox_{step h}, element by element; f(z) = prox(affine(z), 1.0), bit for bit."""
        ...

    def resolvent(self, step: Tensor | float, /) -> Callable[[Tensor], Tensor]:
        """(I + step F)^-1, factored; applying it costs about what `affine` does, and counts as an evaluation."""
        ...

    def adjoint_form(self, z: Tensor, cotangent: Tensor, /) -> ProximalForm:
        """v -> D (W^T v + cotangent) in reversed time, where prox has the slopes D at W z + u: a proximal form, too."""
        ...


def proximal_form(f: FixedPointMap) -> ProximalForm:
    """The parts of f, which offers them as `f.proximal_form`.

    Raises:
        ValueError: if it does not.
    """
    if isinstance(f, CheckedMap):
        f = f.unchecked
    form = getattr(f, "proximal_form", None)
    if form is None:
        raise ValueError(
            f"an operator splitting of {type(f).__name__}: expected an f that offers `proximal_form`, its parts in f(z) = "
            "prox(W z + u) with I - W >= m I, as the cell 'monotone' (of one block) does. Take that cell, or a solver that "
            "needs no more of f than its values, such as Broyden."
        )
    return form
