"""Forward-backward and Peaceman-Rachford splitting: proved rates, for maps f(z) = prox_h(W z + u) with I - W >= m I.

z = f(z) says 0 in F(z) + dh(z), with F(z) = (I - W) z - u. Where F is known at z, so is f(z) = prox_h(z - F(z)); both
methods begin a step with the backward half of it, y = prox_{step h}(z - step F(z)), which only looks at z and F(z).

Their coefficients are constants, and W is causal: every prefix of an iterate is the iterate of that prefix.

References:
    Winston, Kolter 2020, "Monotone operator equilibrium networks", section 3.1 and appendix A. Ryu, Boyd 2016, "A primer on
    monotone operator methods".
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deq_lm._types import FixedPointMap, Scope
from deq_lm.solvers.base import FixedPointSolver, SolverState
from deq_lm.solvers.proximal_form import ProximalForm, proximal_form
from deq_lm.solvers.scope import check_scope, hold


@dataclass(frozen=True)
class SplittingState(SolverState):
    """Adds f by its parts, and what the next step needs.

    Attributes:
        form: f by its parts.
        argument: W z + u at `point`, of which `image` is the proximal map.
        step_size: of this solve.
        resolvent: (I + step_size F)^-1, factored; None where the method needs none.
    """

    form: ProximalForm
    argument: Tensor
    step_size: Tensor | float
    resolvent: Callable[[Tensor], Tensor] | None


@dataclass(frozen=True, kw_only=True)
class Splitting(FixedPointSolver):
    """What the two have in common."""

    step_size: float | None = None
    scope: Scope = "prefix"
    differentiable: ClassVar[bool] = True
    needs_proximal_form: ClassVar[bool] = True

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.step_size is not None and not 0.0 < self.step_size < math.inf:
            raise ValueError(
                f"{name}(step_size={self.step_size}): expected a value above 0, or None for that of the best proved rate."
            )
        check_scope(name, self.scope)

    def init(self, f: FixedPointMap, z0: Tensor) -> SplittingState:
        form = proximal_form(f)
        step_size = self._step_size(form)
        argument = form.affine(z0)
        image = form.prox(argument, 1.0)
        return SplittingState(z0, image, 1, form, argument, step_size, self._resolvent(form, step_size))

    def step(self, f: FixedPointMap, state: SolverState, active: Tensor | None) -> SplittingState:
        assert isinstance(state, SplittingState)
        z, step_size = state.point, state.step_size
        forward = z + step_size * (state.argument - z)  # z - step F(z)
        point, argument = self._advance(state, forward, state.form.prox(forward, step_size), active)
        argument = hold(active, argument, state.argument)
        image = state.form.prox(argument, 1.0)
        return SplittingState(point, image, state.num_evaluations + 1, state.form, argument, step_size, state.resolvent)

    def certified_steps(self, form: ProximalForm, z0: Tensor, solution: Tensor, rtol: float) -> Tensor:
        """Steps after which theory is sure that ||f(z) - z|| <= rtol ||f(z)||, (B,) of each sequence.

        Where the distance from the solution z* is at most rate^k d after k steps, the residual is at most (1 + w) rate^k d
        with w = 1 + L >= ||W||, and ||f(z)|| at least ||z*|| - w rate^k d.

        Args:
            form: f by its parts.
            z0: the start, (B, L, ...).
            solution: z*.
            rtol: above 0.

        Returns:
            Whole numbers; inf where there is no bound, by the rate or because z* is 0.
        """
        step_size = self._step_size(form)
        rate = self.rate(form, step_size)
        distance = self._distance(form, z0, solution, step_size)
        size, w = solution.flatten(1).norm(dim=1), 1 + form.lipschitz
        if rate >= 1.0:
            return torch.full_like(distance, torch.inf)
        small_enough = rtol * size / (distance * (1 + w + rtol * w))
        return (small_enough.log() / math.log(rate)).ceil().clamp(min=0)

    def _step_size(self, form: ProximalForm) -> Tensor | float:
        return self.best_step_size(form) if self.step_size is None else self.step_size

    def _distance(self, form: ProximalForm, z0: Tensor, solution: Tensor, step_size: Tensor | float) -> Tensor:
        """d, (B,): the distance from the solution is at most rate^k d after k steps."""
        return (z0 - solution).flatten(1).norm(dim=1)

    @abstractmethod
    def best_step_size(self, form: ProximalForm) -> Tensor | float:
        """The step of the best proved rate."""

    @abstractmethod
    def rate(self, form: ProximalForm, step_size: Tensor | float) -> float:
        """Factor, per step, of the proved bound on the distance from the solution; 1 or more is none."""

    @abstractmethod
    def _resolvent(self, form: ProximalForm, step_size: Tensor | float) -> Callable[[Tensor], Tensor] | None: ...

    @abstractmethod
    def _advance(
        self, state: SplittingState, forward: Tensor, backward: Tensor, active: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The next point, held where not active, and W z + u there."""


@dataclass(frozen=True, kw_only=True)
class ForwardBackward(Splitting):
    """z <- prox_{step h}(z - step F(z)).

    Converges for 0 < step < 2 m / L^2, since then both halves together contract: prox is nonexpansive, and
    ||(I - step (I - W)) e||^2 <= (1 - 2 step m + step^2 L^2) ||e||^2. A step costs one evaluation.

    Attributes:
        step_size: None is m / L^2, half the limit, where that factor is smallest, 1 - (m / L)^2. A step above the limit is
            taken as given: it may converge, and often faster.
        scope: the iterates are causal under either; it decides what the stopping rule judges as one, and under `sequence`
            that rule looks at the future.

    Raises:
        ValueError: if a value is out of range, or from the solve if f does not offer its parts.
    """

    def best_step_size(self, form: ProximalForm) -> Tensor | float:
        return form.margin / form.lipschitz**2

    def rate(self, form: ProximalForm, step_size: Tensor | float) -> float:
        """Of ||z - z*||."""
        return math.sqrt(float(1 - 2 * step_size * form.margin + step_size**2 * form.lipschitz**2))

    def _resolvent(self, form: ProximalForm, step_size: Tensor | float) -> None:
        return None

    def _advance(
        self, state: SplittingState, forward: Tensor, backward: Tensor, active: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        point = hold(active, backward, state.point)
        return point, state.form.affine(point)


@dataclass(frozen=True, kw_only=True)
class PeacemanRachford(Splitting):
    """z <- (I + step F)^-1 (2 y - x) with x = z - step F(z), y = prox_{step h}(x).

    With v = z + step F(z) this is v <- (2 prox_{step h} - I)(2 (I + step F)^-1 - I) v, and z = (I + step F)^-1 v. It
    converges for every step: the first reflection is nonexpansive, and for p = z - z', q = step (F(z) - F(z')) the second
    has ||p - q||^2 / ||p + q||^2 = 1 - 4 <p, q> / (||p||^2 + 2 <p, q> + ||q||^2) <= 1 - 4 s m / (1 + 2 s m + s^2 L^2) at
    s = step, since <p, q> >= s m ||p||^2 and ||q|| <= s L ||p||. That is the square of the factor by which v - v* shrinks,
    and ||z - z*|| <= ||v - v*|| / (1 + s m).

    The resolvent gives W z + u of its own result, z - (v - z) / step, and with it f(z): a step costs one application of
    it, counted as one evaluation, and none of f. That argument is as exact as rounding, magnified by 1 / step, allows.

    Attributes:
        step_size: None is 1 / L, where the factor is smallest, sqrt((L - m) / (L + m)).
        scope: as of `ForwardBackward`.

    Raises:
        ValueError: as `ForwardBackward`.
    """

    def best_step_size(self, form: ProximalForm) -> Tensor | float:
        return 1 / form.lipschitz

    def rate(self, form: ProximalForm, step_size: Tensor | float) -> float:
        """Of ||v - v*||."""
        m, lipschitz = step_size * form.margin, step_size * form.lipschitz
        return math.sqrt(float(1 - 4 * m / (1 + 2 * m + lipschitz**2)))

    def _distance(self, form: ProximalForm, z0: Tensor, solution: Tensor, step_size: Tensor | float) -> Tensor:
        v, v_star = (z + step_size * (z - form.affine(z)) for z in (z0, solution))
        return super()._distance(form, v, v_star, step_size) / (1 + step_size * form.margin)

    def _resolvent(self, form: ProximalForm, step_size: Tensor | float) -> Callable[[Tensor], Tensor]:
        return form.resolvent(step_size)

    def _advance(
        self, state: SplittingState, forward: Tensor, backward: Tensor, active: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert state.resolvent is not None
        # A frozen unit gets the v whose resolvent it is, so that later ones are solved with it where it stands.
        v = hold(active, 2 * backward - forward, 2 * state.point - forward)
        point = hold(active, state.resolvent(v), state.point)
        return point, point - (v - point) / state.step_size
