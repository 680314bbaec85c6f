"""f(z) = prox_h(W z + u) with W a dense matrix over all positions: what an operator splitting asks for, without a cell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from problems import Problem, causal_matrix
from torch import Tensor

from deq_lm.cells.prox import Prox, relu
from deq_lm.solvers import FixedPointSolver, ProximalForm


@dataclass(frozen=True)
class DenseForm:
    """A proximal form by textbook formulas.

    Attributes:
        matrix: W of flattened sequences, (L D, L D).
        offset: u, (B, L, D).
        activation: (v, step) -> prox_{step h}(v).
        spoil: called with every W z + u and every resolvent's result, to count them or to replace them.
    """

    matrix: Tensor
    offset: Tensor
    activation: Prox = relu
    spoil: Callable[[Tensor], Tensor] = field(default=lambda value: value)

    @property
    def proximal_form(self) -> DenseForm:
        return self

    @property
    def margin(self) -> float:
        return torch.linalg.eigvalsh(self._one_minus + self._one_minus.T)[0].item() / 2

    @property
    def lipschitz(self) -> float:
        return torch.linalg.matrix_norm(self._one_minus, 2).item()

    def __call__(self, z: Tensor) -> Tensor:
        return self.prox(self.affine(z), 1.0)

    def affine(self, z: Tensor) -> Tensor:
        return self.spoil((z.flatten(1) @ self.matrix.T).view_as(z) + self.offset)

    def prox(self, argument: Tensor, step: Tensor | float) -> Tensor:
        return self.activation(argument, step)

    def resolvent(self, step: Tensor | float) -> Callable[[Tensor], Tensor]:
        identity = torch.eye(len(self.matrix), dtype=self.matrix.dtype)
        _, length, width = self.offset.shape
        causal = torch.kron(torch.ones(length, length).tril(), torch.ones(width, width)).to(identity)
        inverse = torch.linalg.inv(identity + step * self._one_minus) * causal  # without rounding's 1e-17 elsewhere
        return lambda v: self.spoil(((v + step * self.offset).flatten(1) @ inverse.T).view_as(v))

    def adjoint_form(self, z: Tensor, cotangent: Tensor) -> ProximalForm:
        with torch.enable_grad():
            argument = self.affine(z).detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.prox(argument, 1.0).sum(), argument)
        slope, (_, length, width) = slope.flip(1), z.shape
        reversed_in_time = self.matrix.T.unflatten(0, (length, width)).unflatten(2, (length, width)).flip(0, 2)
        matrix = reversed_in_time.flatten(2).flatten(0, 1)
        # D = (1 + step q)^-1 at step 1, of a quadratic with q = 1 / D - 1
        return DenseForm(matrix, cotangent.flip(1), lambda v, step: v / (1 + step * (1 / slope - 1)))

    def scaled(self, scale: float) -> DenseForm:
        """The map s f(z / s)."""
        return replace(self, offset=scale * self.offset)

    @property
    def _one_minus(self) -> Tensor:
        return torch.eye(len(self.matrix), dtype=self.matrix.dtype) - self.matrix


def monotone_matrix(length: int, width: int, seed: int, *, margin: float = 0.5) -> Tensor:
    """W causal with I - W >= margin I and nothing better, dense within what causality allows."""
    matrix = causal_matrix(length, width, seed)
    matrix = matrix / torch.linalg.matrix_norm(matrix, 2)
    largest = torch.linalg.eigvalsh(matrix + matrix.T)[-1] / 2
    return matrix + (1 - margin - largest) * torch.eye(len(matrix), dtype=matrix.dtype)


def monotone(*, batch: int = 3, length: int = 4, width: int = 5, seed: int = 0) -> Problem:
    """z -> relu(W z + u), with u chosen for a z* of which half is zero."""
    matrix = monotone_matrix(length, width, seed)
    generator = torch.Generator().manual_seed(seed)
    argument = torch.randn(batch, length, width, dtype=torch.float64, generator=generator)
    z_star = argument.relu()
    offset = argument - (z_star.flatten(1) @ matrix.T).view_as(z_star)
    return Problem("monotone", DenseForm(matrix, offset), z_star, is_contraction=True)


def problem_for(solver: FixedPointSolver, otherwise: Problem) -> Problem:
    """A problem that the solver is for: `otherwise`, or for an operator splitting one that can be taken apart."""
    return monotone() if solver.needs_proximal_form else otherwise


def counted(f: Callable[[Tensor], Tensor], calls: list[int]) -> Callable[[Tensor], Tensor]:
    """The same map, which adds an entry to `calls` with every evaluation, a resolvent's included."""

    def count(value: Tensor) -> Tensor:
        calls.append(len(calls))
        return value

    return replace(f, spoil=count) if isinstance(f, DenseForm) else lambda z: count(f(z))


def spoiled(f: Callable[[Tensor], Tensor], spoil: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same map with `spoil` applied to every evaluation, a resolvent's included."""
    return replace(f, spoil=spoil) if isinstance(f, DenseForm) else lambda z: spoil(f(z))


def scaled(f: Callable[[Tensor], Tensor], scale: float) -> Callable[[Tensor], Tensor]:
    """z -> s f(z / s)."""
    return f.scaled(scale) if isinstance(f, DenseForm) else lambda z: scale * f(z / scale)
