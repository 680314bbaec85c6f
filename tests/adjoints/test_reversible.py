"""The gradient by running a reversible solve backwards: the unrolled one, digit for digit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from problems import causal_matrix
from torch import Tensor

from deq_lm.adjoints import Implicit, Reversed, Unrolled
from deq_lm.cells.base import BoundCell
from deq_lm.cells.transformer_xl import TransformerXLCell, TransformerXLConfig
from deq_lm.equilibrium import Equilibrium
from deq_lm.errors import ReversalWarning
from deq_lm.evaluation.peak_memory import peak_live_bytes, saved_bytes
from deq_lm.solvers import Anderson, Broyden, Outcome, Picard, Reversible, StoppingRule, solve

BATCH, LENGTH, WIDTH = 2, 4, 5
TIGHT = StoppingRule(max_steps=500, rtol=1e-12, patience=40)
LOOSE = StoppingRule(max_steps=60, rtol=1e-2)  # stops every unit at another step


@dataclass(frozen=True)
class Affine:
    """z -> activation(A z + x), sequence by sequence, so that rounding does not depend on the batch."""

    matrix: Tensor
    x: Tensor
    activation: Callable[[Tensor], Tensor] = torch.tanh

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (self.matrix, self.x)

    def with_inputs(self, inputs: Sequence[Tensor]) -> Affine:
        return replace(self, **dict(zip(("matrix", "x"), inputs, strict=True)))

    def __call__(self, z: Tensor) -> Tensor:
        return self.activation(torch.stack([(self.matrix @ one.flatten()).view_as(one) for one in z]) + self.x)


def make(norm: float = 0.8) -> Affine:
    matrix = causal_matrix(LENGTH, WIDTH, seed=0)
    matrix = norm * matrix / torch.linalg.matrix_norm(matrix, 2)
    x = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return Affine(matrix.requires_grad_(), x.requires_grad_())


def cell(dtype: torch.dtype, *, length: int = 24, dropout: float = 0.0) -> tuple[TransformerXLCell, Tensor]:
    torch.manual_seed(0)
    config = TransformerXLConfig(d_model=32, num_heads=4, d_inner=64, mem_len=0, init_std=0.2, dropout=dropout)
    return TransformerXLCell(config).to(dtype), torch.randn(3, length, 32).to(dtype).requires_grad_()


def run(rule: StoppingRule, **options):
    return partial(solve, solver=Reversible(**options), stopping=rule)


def gradients(f, adjoint, solver, cotangent: Tensor, z0: Tensor | None = None) -> list[Tensor]:
    start = torch.zeros_like(cotangent) if z0 is None else z0
    return list(torch.autograd.grad(adjoint.apply(f, start, solver)[0], f.inputs, cotangent))


def assert_same(found: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert torch.dist(one, other) <= tolerance * other.norm()
        assert other.norm() > 0


@pytest.fixture
def cotangent() -> Tensor:
    return torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("num_pairs", [0, 1, 4, 12])
@pytest.mark.parametrize("relaxation", [0.3, 0.5, 0.8])
def test_it_is_the_gradient_of_the_published_pair_iteration(cotangent: Tensor, relaxation: float, num_pairs: int):
    f = make()
    y = z = torch.zeros_like(cotangent)
    for _ in range(num_pairs):
        y = (1 - relaxation) * y + relaxation * f(z)
        z = (1 - relaxation) * z + relaxation * f(y)
    wanted = torch.autograd.grad(f(z), f.inputs, cotangent, materialize_grads=True)
    found = gradients(f, Reversed(), run(StoppingRule.fixed(2 * num_pairs), relaxation=relaxation), cotangent)
    for one, other in zip(found, wanted, strict=True):
        assert torch.dist(one, other) <= 1e-10 * other.norm()


@pytest.mark.parametrize("check_every", [1, 7])
@pytest.mark.parametrize("scope", ["prefix", "sequence"])
@pytest.mark.parametrize("relaxation", [0.1, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("rule", [LOOSE, replace(LOOSE, rtol=1e-6), StoppingRule.fixed(70)], ids=str)
def test_it_is_the_unrolled_gradient_wherever_each_unit_stopped(
    cotangent: Tensor, rule: StoppingRule, relaxation: float, scope: str, check_every: int
):
    solver = run(replace(rule, check_every=check_every), relaxation=relaxation, scope=scope)
    f = make()
    assert_same(gradients(f, Reversed(), solver, cotangent), gradients(f, Unrolled(), solver, cotangent), 1e-13)


def test_units_do_stop_at_different_steps_in_the_test_above():
    f = make()
    _, solution = Reversed().apply(f, torch.zeros_like(f.x), run(LOOSE))
    assert len(solution.position_num_steps.unique()) >= 3


def test_a_unit_that_diverges_is_run_back_from_where_it_was_frozen(cotangent: Tensor):
    """A diverged position is frozen before those it follows, so the image it returns is of an earlier mixed state."""
    plain = make(norm=0.5)
    matrix = plain.matrix.detach().clone()
    matrix[WIDTH : 2 * WIDTH, WIDTH : 2 * WIDTH] *= 40.0  # the second position's own block
    f = Affine(matrix.requires_grad_(), plain.x, activation=lambda z: z)
    solver = run(StoppingRule(max_steps=12, rtol=0.0, divergence_factor=10.0))
    _, solution = Reversed().apply(f, torch.zeros_like(f.x), solver)
    assert solution.outcome.tolist() == [Outcome.DIVERGED] * 2
    assert solution.position_num_steps[0, 1] < solution.position_num_steps[0, 0] == 12
    assert_same(gradients(f, Reversed(), solver, cotangent), gradients(f, Unrolled(), solver, cotangent), 1e-12)


def test_a_start_that_is_not_zero_or_solved_already_is_run_back_to(cotangent: Tensor):
    f = make()
    z0 = torch.randn(cotangent.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    z0[1] = solve(f, torch.zeros_like(z0), solver=Broyden(), stopping=StoppingRule(max_steps=200, rtol=1e-14)).z[1]
    solver = run(replace(LOOSE, rtol=1e-6))
    assert solver(f, z0).num_steps[1] == 0
    found = gradients(f, Reversed(), solver, cotangent, z0)
    assert_same(found, gradients(f, Unrolled(), solver, cotangent, z0), 1e-13)


def test_at_convergence_it_is_the_implicit_and_the_unrolled_gradient(cotangent: Tensor):
    f = make()
    found = gradients(f, Reversed(), run(TIGHT), cotangent)
    implicit = gradients(f, Implicit(stopping=TIGHT), partial(solve, solver=Broyden(), stopping=TIGHT), cotangent)
    unrolled = gradients(f, Unrolled(), partial(solve, solver=Picard(), stopping=StoppingRule.fixed(200)), cotangent)
    assert_same(found, implicit, 1e-6)
    assert_same(found, unrolled, 1e-6)


def test_it_passes_gradcheck():
    f = make()

    def output(matrix: Tensor, x: Tensor) -> Tensor:
        return Reversed().apply(f.with_inputs((matrix, x)), torch.zeros_like(x), run(StoppingRule.fixed(5)))[0]

    assert torch.autograd.gradcheck(output, f.inputs, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("relaxation", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_backwards_it_visits_the_states_of_the_forward_solve_to_the_last_bit(dtype: torch.dtype, relaxation: float):
    module, x = cell(dtype)
    bound = module.bind(x)
    visited: list[Tensor] = []
    z0 = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).to(dtype)  # between points of the lattice
    z0 = z0 / 3

    @dataclass(frozen=True)
    class Watched:
        f: BoundCell

        @property
        def inputs(self) -> tuple[Tensor, ...]:
            return self.f.inputs

        def with_inputs(self, inputs: Sequence[Tensor]) -> Watched:
            return Watched(self.f.with_inputs(inputs))

        def __call__(self, z: Tensor) -> Tensor:
            visited.append(z.detach().clone())
            return self.f(z)

    output, _ = Reversed().apply(Watched(bound), z0, run(StoppingRule.fixed(80), relaxation=relaxation))
    forwards = visited.copy()
    visited.clear()
    output.sum().backward()
    assert len(visited) == len(forwards) == 81
    assert all(torch.equal(*pair) for pair in zip(visited, reversed(forwards), strict=True))


@pytest.mark.parametrize("autocast", [False, True])
def test_the_cell_in_float32_and_under_autocast(autocast: bool):
    module, x = cell(torch.float32)
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    found = []
    for adjoint in (Reversed(), Unrolled()):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output, _ = adjoint.apply(module.bind(x), torch.zeros_like(x), run(StoppingRule.fixed(60)))
        found.append(torch.autograd.grad(output, [x, *module.parameters()], cotangent))
    # In bfloat16 the unrolled gradient sums 60 contributions in bfloat16, this one in float32.
    assert_same(*found, tolerance=0.1 if autocast else 1e-5)


def test_the_dropout_mask_is_one_for_both_directions():
    module, x = cell(torch.float64, dropout=0.3)
    f = module.train().bind(x)
    cotangent = torch.ones_like(x)
    reversed_, unrolled = (
        torch.autograd.grad(adjoint.apply(f, torch.zeros_like(x), run(LOOSE))[0], x, cotangent, retain_graph=True)
        for adjoint in (Reversed(), Unrolled())
    )
    assert_same(reversed_, unrolled, 1e-12)


def test_memory_is_the_same_for_8_and_32_steps_and_a_word_more_where_digits_fill_one():
    def measure(adjoint, num_steps: int, relaxation: float) -> tuple[int, int]:
        module, x = cell(torch.float32, length=64)
        f, solver = module.bind(x), run(StoppingRule.fixed(num_steps), relaxation=relaxation)

        def forward() -> Tensor:
            return adjoint.apply(f, torch.zeros_like(x), solver)[0]

        return saved_bytes(forward, besides=f.inputs), peak_live_bytes(
            lambda: torch.autograd.grad(forward(), f.inputs, torch.ones_like(x))
        )

    (saved, peak), (saved_32, peak_32) = (measure(Reversed(), steps, 0.5) for steps in (8, 32))
    assert saved == saved_32 > 0
    assert peak_32 <= peak + 16 * 32  # the solver's traces: two numbers a sequence and step
    word = 8 * 3 * 64 * 32
    saved_40, _ = measure(Reversed(), 40, 0.5)
    assert saved_40 == saved + word
    unrolled, unrolled_peak = measure(Unrolled(), 32, 0.5)
    assert unrolled > 20 * saved_32
    assert unrolled_peak > 3 * peak_32


def test_another_solver_is_refused_with_what_to_do():
    f = make()
    for solver in (Picard(), Broyden(), Anderson()):
        with pytest.raises(ValueError, match="Reversible"):
            Reversed().apply(f, torch.zeros_like(f.x), partial(solve, solver=solver))
        with pytest.raises(ValueError, match=f"{type(solver).__name__}: expected the solver Reversible"):
            Equilibrium(cell(torch.float32)[0], solver=solver, adjoint=Reversed())


def test_a_function_that_is_another_one_backwards_is_noticed(cotangent: Tensor):
    calls = 0

    class Drifting(Affine):
        def with_inputs(self, inputs: Sequence[Tensor]) -> Affine:
            return Drifting(*inputs)

        def __call__(self, z: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return super().__call__(z) * (1 + 1e-12 * calls)

    plain = make()
    f = Drifting(*plain.inputs)
    with pytest.warns(ReversalWarning, match="away from its start"):
        gradients(f, Reversed(), run(StoppingRule.fixed(40)), cotangent)


def test_states_that_outgrow_the_lattice_are_noticed(cotangent: Tensor):
    f = make()
    z0 = torch.zeros_like(cotangent)
    start = f.with_inputs((f.matrix, (1e-9 * f.x).detach().requires_grad_()))
    growing = start.with_inputs(((8 * start.matrix).detach().requires_grad_(), start.x))
    with pytest.warns(ReversalWarning, match="states grew"):
        gradients(growing, Reversed(), run(StoppingRule.fixed(80)), cotangent, z0)


def test_a_second_backward_is_the_same_or_refused_and_two_forwards_do_not_mix(cotangent: Tensor):
    f, other = make(), make(norm=0.3)
    wanted, wanted_other = (gradients(g, Reversed(), run(LOOSE), cotangent) for g in (f, other))
    first, _ = Reversed().apply(f, torch.zeros_like(f.x), run(LOOSE))
    second, _ = Reversed().apply(other, torch.zeros_like(f.x), run(LOOSE))
    for output, g, expected in [(first, f, wanted), (second, other, wanted_other), (first, f, wanted)]:
        found = torch.autograd.grad(output, g.inputs, cotangent, retain_graph=True)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    torch.autograd.grad(first, f.inputs, cotangent)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(first, f.inputs, cotangent)


def test_weights_changed_between_the_passes_and_second_derivatives_are_refused(cotangent: Tensor):
    f = make()
    output, _ = Reversed().apply(f, torch.zeros_like(f.x), run(LOOSE))
    (once,) = torch.autograd.grad(output.square().sum(), f.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        once.sum().backward(retain_graph=True)
    with torch.no_grad():
        f.matrix.mul_(1.01)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(output, f.inputs, cotangent)


@pytest.mark.parametrize("scale", [1e-8, 1e-30, 1e8])
def test_scaling_the_cotangent_scales_the_gradient(cotangent: Tensor, scale: float):
    f = make()
    plain, scaled = (gradients(f, Reversed(), run(LOOSE), s * cotangent) for s in (1.0, scale))
    assert_same([gradient / scale for gradient in scaled], plain, 1e-13)


def test_a_sequence_alone_and_in_a_batch_have_the_same_gradient_in_every_bit(cotangent: Tensor):
    f = make()
    scale = torch.tensor([0.01, 1.0], dtype=torch.float64).view(2, 1, 1)  # so that each has a lattice of its own
    f = f.with_inputs((f.matrix, (scale * f.x).detach().requires_grad_()))
    alone = f.with_inputs((f.matrix, f.x[:1].detach().requires_grad_()))
    together = gradients(f, Reversed(), run(LOOSE), cotangent)[1]
    assert torch.equal(together[:1], gradients(alone, Reversed(), run(LOOSE), cotangent[:1])[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_output_it_is_attached_to_does_not_depend_on_later_positions_in_any_bit(dtype: torch.dtype):
    module, x = cell(dtype)
    for cut in (1, 9, 23):
        later = torch.cat([x[:, :cut], 2 * x[:, cut:].flip(1)], dim=1)
        for rule in (StoppingRule.fixed(7), LOOSE):
            outputs = [Reversed().apply(module.bind(v), torch.zeros_like(v), run(rule))[0] for v in (x, later)]
            assert torch.equal(outputs[0][:, :cut], outputs[1][:, :cut])
            assert not torch.equal(outputs[0][:, cut:], outputs[1][:, cut:])


def test_zero_and_broken_cotangents_go_through(cotangent: Tensor):
    f = make()
    assert not any(gradient.any() for gradient in gradients(f, Reversed(), run(LOOSE), 0 * cotangent))
    cotangent[0, 0, 0] = float("nan")
    assert all(gradient.isnan().any() for gradient in gradients(f, Reversed(), run(LOOSE), cotangent))


def test_what_is_returned_besides_the_output_holds_no_graph_and_no_trail():
    f = make()
    output, solution = Reversed().apply(f, torch.zeros_like(f.x), run(LOOSE))
    assert output.requires_grad
    assert torch.equal(output.detach(), solution.image)
    assert not solution.z.requires_grad
    assert not solution.image.requires_grad
    assert solution.trail is None
