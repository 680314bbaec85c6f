"""f(z) = prox_h(W z + u) by its parts, which operator splittings take apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deq_lm.cells.causal_operator import CausalOperator
from deq_lm.cells.prox import Prox


@dataclass(frozen=True)
class ProximalMap:
    """What `deq_lm.solvers.proximal_form.ProximalForm` asks for, of a causal W.

    Attributes:
        operator: W.
        offset: u, (B, L, D); 0 at padding.
        activation: (v, step) -> prox_{step h}(v), element by element.
        margin: m with <z, (I - W) z> >= m ||z||^2 for all z; positive.
        lipschitz: L >= ||I - W||, 0-dim.
    """

    operator: CausalOperator
    offset: Tensor
    activation: Prox
    margin: float
    lipschitz: Tensor

    def __call__(self, z: Tensor) -> Tensor:
        return self.prox(self.affine(z), 1.0)

    @property
    def proximal_form(self) -> ProximalMap:
        return self

    def affine(self, z: Tensor) -> Tensor:
        """W z + u."""
        return self.operator(z) + self.offset

    def prox(self, argument: Tensor, step: Tensor | float) -> Tensor:
        """prox_{step h}; 0 at padding, where h allows nothing else."""
        image = self.activation(argument, step)
        return image if self.operator.present is None else torch.where(self.operator.present, image, 0.0)

    def resolvent(self, step: Tensor | float) -> Callable[[Tensor], Tensor]:
        """v -> z with z + step ((I - W) z - u) = v; what does not depend on v is computed here."""
        inverse = self.operator.resolvent(step)
        return lambda v: inverse(v + step * self.offset)

    def adjoint_form(self, z: Tensor, cotangent: Tensor) -> ProximalMap:
        """The map v -> D (W^T v + cotangent) in reversed time, D the slope of the activation at W z + u: again such a map.

        Every slope of a proximal map lies in [0, 1], and multiplying by one is the proximal map of a quadratic,
        (1 / d - 1) x^2 / 2: at another step it is d / (d + step (1 - d)). W^T has the margin and norm of W.

        Args:
            z: where the slope is taken, (B, L, D).
            cotangent: dL/df, (B, L, D), both in the order of time.

        References:
            Winston, Kolter 2020, "Monotone operator equilibrium networks", theorem 2.
        """
        with torch.enable_grad():
            argument = self.affine(z.detach()).detach().requires_grad_()
            image = self.prox(argument, 1.0)
        (slope,) = torch.autograd.grad(image, argument, torch.ones_like(image))
        slope = slope.flip(1)

        def scaled(v: Tensor, step: Tensor | float) -> Tensor:
            return v * (slope / (slope + step * (1 - slope)))

        operator = self.operator.transposed()
        return ProximalMap(operator, cotangent.flip(1), scaled, self.margin, self.lipschitz)
