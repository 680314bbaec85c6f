"""Gradients against closed forms, against each other, and against finite differences. All float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from dense_form import DenseForm
from problems import causal_matrix
from torch import Tensor

from deq_lm.adjoints import Implicit, JacobianFree, Phantom, Unrolled
from deq_lm.solvers import (
    Anderson,
    Broyden,
    ForwardBackward,
    Outcome,
    PeacemanRachford,
    Picard,
    Solution,
    StoppingRule,
    solve,
)

TIGHT = StoppingRule(max_steps=500, rtol=1e-13, patience=40)
EXACT = partial(solve, solver=Broyden(), stopping=TIGHT)
BATCH, LENGTH, WIDTH = 2, 3, 4


@dataclass(frozen=True)
class AffineThen:
    """z -> activation(A z + x), with A and x as the differentiable inputs."""

    activation: Callable[[Tensor], Tensor]
    matrix: Tensor
    x: Tensor

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (self.matrix, self.x)

    def with_inputs(self, inputs: Sequence[Tensor]) -> AffineThen:
        return AffineThen(self.activation, *inputs)

    def __call__(self, z: Tensor) -> Tensor:
        return self.activation((z.flatten(1) @ self.matrix.T).view_as(z) + self.x)

    @property
    def proximal_form(self) -> DenseForm:
        """Of a matrix whose norm is below 1; of the activation at step 1 alone, which is all an adjoint asks for."""
        return DenseForm(self.matrix.detach(), self.x.detach(), lambda v, step: self.activation(v))


def make(activation: Callable[[Tensor], Tensor] = torch.tanh, spectral_norm: float = 0.8) -> AffineThen:
    matrix = causal_matrix(LENGTH, WIDTH, seed=0)
    matrix = spectral_norm * matrix / torch.linalg.matrix_norm(matrix, 2)
    x = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return AffineThen(activation, matrix.requires_grad_(), x.requires_grad_())


def gradients(f: AffineThen, adjoint, cotangent: Tensor, run=EXACT, **options) -> tuple[Tensor, ...]:
    output, _ = adjoint.apply(f, torch.zeros_like(f.x), run, **options)
    return torch.autograd.grad(output, f.inputs, cotangent)


@pytest.fixture
def cotangent() -> Tensor:
    return torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


IMPLICIT = [
    Implicit(solver=solver(scope=scope), stopping=TIGHT)
    for solver in (Broyden, Anderson, Picard, ForwardBackward, PeacemanRachford)
    for scope in ("prefix", "sequence")
]
every_implicit = pytest.mark.parametrize(
    "adjoint", IMPLICIT, ids=lambda a: f"{type(a.solver).__name__}-{a.solver.scope}"
)


@every_implicit
def test_implicit_gradient_of_a_linear_map_is_the_closed_form(adjoint: Implicit, cotangent: Tensor):
    f = make(activation=lambda z: z)
    grad_matrix, grad_x = gradients(f, adjoint, cotangent)
    identity = torch.eye(LENGTH * WIDTH, dtype=torch.float64)
    u = torch.linalg.solve((identity - f.matrix.detach()).T, cotangent.flatten(1).T).T
    z_star = torch.linalg.solve(identity - f.matrix.detach(), f.x.detach().flatten(1).T).T
    torch.testing.assert_close(grad_x.flatten(1), u, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(grad_matrix, u.T @ z_star, rtol=1e-9, atol=1e-10)


@every_implicit
def test_implicit_gradient_is_the_unrolled_gradient_at_convergence(adjoint: Implicit, cotangent: Tensor):
    f = make()
    long_unroll = partial(solve, solver=Picard(), stopping=StoppingRule.fixed(300))
    expected = gradients(f, Unrolled(), cotangent, long_unroll)
    for found, wanted in zip(gradients(f, adjoint, cotangent), expected, strict=True):
        assert torch.dist(found, wanted) <= 1e-6 * wanted.norm()


def test_implicit_gradient_passes_gradcheck():
    f = make()

    def output(matrix: Tensor, x: Tensor) -> Tensor:
        return Implicit(stopping=TIGHT).apply(f.with_inputs((matrix, x)), torch.zeros_like(x), EXACT)[0]

    assert torch.autograd.gradcheck(output, f.inputs, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-8, 1e-30, 1e8])
@every_implicit
def test_scaling_the_cotangent_scales_the_gradient(adjoint: Implicit, cotangent: Tensor, scale: float):
    f = make()
    coarse = Implicit(solver=adjoint.solver, stopping=StoppingRule(max_steps=6, rtol=1e-2))
    plain = gradients(f, coarse, cotangent)
    scaled = gradients(f, coarse, scale * cotangent)
    for found, wanted in zip(scaled, plain, strict=True):
        assert torch.dist(found / scale, wanted) <= 1e-6 * wanted.norm()


@every_implicit
def test_a_zero_cotangent_gives_a_zero_gradient_in_one_evaluation(adjoint: Implicit, cotangent: Tensor):
    reports: list[Solution] = []
    cotangent[0] = 0.0
    _, grad_x = gradients(make(), adjoint, cotangent, report=reports.append)
    assert torch.equal(grad_x[0], torch.zeros_like(grad_x[0]))
    assert reports[0].num_evaluations[0] == 1
    assert grad_x[1].norm() > 0


def test_a_second_backward_gives_the_same_gradient_and_two_forwards_do_not_mix(cotangent: Tensor):
    f, adjoint = make(), Implicit(stopping=TIGHT)
    first, _ = adjoint.apply(f, torch.zeros_like(f.x), EXACT)
    second, _ = adjoint.apply(make(spectral_norm=0.3), torch.zeros_like(f.x), EXACT)
    once = torch.autograd.grad(first, f.inputs, cotangent, retain_graph=True)
    again = torch.autograd.grad(first, f.inputs, cotangent)
    for a, b in zip(once, again, strict=True):
        assert torch.equal(a, b)
    assert not torch.allclose(first, second)


def test_an_input_computed_from_a_parameter_is_not_counted_twice(cotangent: Tensor):
    f = make()
    derived = f.with_inputs((f.matrix, (f.x.flatten(1) @ f.matrix).view_as(f.x)))
    long_unroll = partial(solve, solver=Picard(), stopping=StoppingRule.fixed(300))
    results = []
    for adjoint, run in [(Implicit(stopping=TIGHT), EXACT), (Unrolled(), long_unroll)]:
        output, _ = adjoint.apply(derived, torch.zeros_like(f.x), run)
        results.append(torch.autograd.grad(output, (f.matrix, f.x), cotangent, retain_graph=True))
    for found, wanted in zip(*results, strict=True):
        assert torch.dist(found, wanted) <= 1e-6 * wanted.norm()


def test_the_adjoint_solve_is_reported_and_says_when_it_did_not_converge(cotangent: Tensor):
    reports: list[Solution] = []
    gradients(make(), Implicit(stopping=TIGHT), cotangent, report=reports.append)
    gradients(make(), Implicit(stopping=StoppingRule(max_steps=1, rtol=1e-9)), cotangent, report=reports.append)
    assert [report.outcome.tolist() for report in reports] == [
        [Outcome.CONVERGED] * 2,
        [Outcome.MAX_STEPS] * 2,
    ]


def test_a_loss_that_is_nan_reaches_the_gradient_instead_of_raising(cotangent: Tensor):
    cotangent[0, 0, 0] = float("nan")
    assert all(gradient.isnan().any() for gradient in gradients(make(), Implicit(), cotangent))


def test_jacobian_free_and_phantom_have_their_closed_forms_on_a_linear_map(cotangent: Tensor):
    f = make(activation=lambda z: z)
    matrix, flat = f.matrix.detach(), cotangent.flatten(1)
    torch.testing.assert_close(gradients(f, JacobianFree(), cotangent)[1].flatten(1), flat)
    for steps, tau in [(1, 1.0), (3, 0.5), (6, 0.8)]:
        relaxed = (1 - tau) * torch.eye(len(matrix), dtype=torch.float64) + tau * matrix
        expected = sum((flat @ torch.linalg.matrix_power(relaxed, i) for i in range(steps)), torch.zeros_like(flat))
        found = gradients(f, Phantom(num_steps=steps, relaxation=tau), cotangent)[1].flatten(1)
        torch.testing.assert_close(found, tau * expected, rtol=1e-9, atol=1e-10)


def test_the_implicit_pass_saves_the_same_bytes_whatever_the_number_of_evaluations():
    f = make()
    sizes = []
    for steps in (4, 64):
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: (s.append(t.nbytes), t)[1], lambda t: t):
            run = partial(solve, solver=Broyden(), stopping=StoppingRule.fixed(steps))
            Implicit().apply(f, torch.zeros_like(f.x), run)
        sizes.append(sum(saved))
    assert sizes[0] == sizes[1] > 0


def test_a_map_that_ignores_z_has_the_gradient_of_a_plain_layer(cotangent: Tensor):
    f = make()
    constant = AffineThen(torch.tanh, f.matrix * 0.0, f.x)

    @dataclass(frozen=True)
    class IgnoresZ(AffineThen):
        def with_inputs(self, inputs: Sequence[Tensor]) -> AffineThen:
            return IgnoresZ(self.activation, *inputs)

        def __call__(self, z: Tensor) -> Tensor:
            return self.activation(self.x)

    ignoring = IgnoresZ(torch.tanh, f.matrix, f.x)
    output, _ = Implicit(stopping=TIGHT).apply(ignoring, torch.zeros_like(f.x), EXACT)
    (found,) = torch.autograd.grad(output, f.x, cotangent)
    (wanted,) = torch.autograd.grad(constant(torch.zeros_like(f.x)), f.x, cotangent)
    torch.testing.assert_close(found, wanted)


def test_unrolling_a_solver_with_coefficients_is_refused():
    f = make()
    with pytest.raises(ValueError, match="Use Picard"):
        Unrolled().apply(f, torch.zeros_like(f.x), EXACT)


@pytest.mark.parametrize("options", [{"num_steps": 0}, {"relaxation": 0.0}, {"relaxation": 1.2}])
def test_phantom_refuses_values_that_mean_nothing(options):
    with pytest.raises(ValueError, match="expected"):
        Phantom(**options)
