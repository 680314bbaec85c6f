"""The estimate against explicit Jacobians."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch

from deq_lm.cells import TransformerXLCell, TransformerXLConfig
from deq_lm.equilibrium import Equilibrium
from deq_lm.regularizers import jacobian_frobenius, jacobian_penalty, jacobian_spectral, spectral_radius


def cell_at_a_point(init_std: float = 0.4):
    torch.manual_seed(0)
    cell = TransformerXLCell(TransformerXLConfig(d_model=8, num_heads=2, d_inner=8, init_std=init_std)).double()
    return cell, torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 3, 8, dtype=torch.float64)


def test_its_mean_is_the_squared_frobenius_norm_per_entry():
    cell, x, z = cell_at_a_point()
    f = cell.bind(x)
    exact = torch.autograd.functional.jacobian(f, z).square().sum() / z.numel()
    generator = torch.Generator().manual_seed(1)
    draws = torch.stack([jacobian_frobenius(f, z, generator=generator).detach() for _ in range(3000)])
    standard_error = draws.std() / len(draws) ** 0.5
    assert abs(draws.mean() - exact) < 4 * standard_error
    assert standard_error < 0.02 * exact


def test_its_gradient_is_that_of_the_same_draw_by_finite_differences():
    cell, x, z = cell_at_a_point()

    def estimate(weight: torch.Tensor) -> torch.Tensor:
        f = cell.bind(x)
        inputs = [weight if tensor is cell.merge.weight else tensor.detach() for tensor in f.inputs]
        return jacobian_frobenius(f.with_inputs(inputs), z, generator=torch.Generator().manual_seed(2))

    assert torch.autograd.gradcheck(estimate, (cell.merge.weight,))


def test_descending_it_makes_the_map_contract():
    cell, x, z = cell_at_a_point()
    optimizer = torch.optim.SGD(cell.parameters(), lr=0.1)
    values = []
    for _ in range(30):
        value = jacobian_frobenius(cell.bind(x), z, generator=torch.Generator().manual_seed(3))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.5 * values[0]


def expected_penalty(f, z: torch.Tensor, parts: list[slice], estimate: Callable) -> torch.Tensor:
    """The mean of an estimate over the sequences, with the same draws in the same order."""
    return sum(estimate(f.select(part), z[part]) * len(z[part]) for part in parts) / len(z)


@pytest.mark.parametrize("power_iterations", [None, 2])
@pytest.mark.parametrize(("num_sequences", "sizes"), [(1, [1]), (3, [1, 1, 1]), (6, [2, 2, 2]), (7, [2, 2, 2, 1])])
def test_the_penalty_is_the_estimate_with_its_gradient(
    num_sequences: int, sizes: list[int], power_iterations: int | None
):
    cell, *_ = cell_at_a_point()
    draw = torch.Generator().manual_seed(8)
    x, z = (torch.randn(num_sequences, 3, 8, dtype=torch.float64, generator=draw) for _ in range(2))
    x.requires_grad_()
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    parts = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    inputs = [x, *(parameter for parameter in cell.parameters() if parameter is not cell.output_norm.bias)]

    torch.manual_seed(9)
    estimate = partial(jacobian_spectral, power_iterations=power_iterations) if power_iterations else jacobian_frobenius
    expected = expected_penalty(cell.bind(x), z, parts, estimate)
    torch.manual_seed(9)
    value = jacobian_penalty(cell.bind(x), z, power_iterations=power_iterations)
    torch.testing.assert_close(value, expected)
    found = torch.autograd.grad(3.0 * value, inputs)
    for gradient, other in zip(found, torch.autograd.grad(3.0 * expected, inputs), strict=True):
        torch.testing.assert_close(gradient, other)


def test_the_penalty_without_a_gradient_is_the_estimate():
    cell, x, z = cell_at_a_point()
    with torch.no_grad():
        torch.manual_seed(9)
        value = jacobian_penalty(cell.bind(x), z)
        torch.manual_seed(9)
        assert value.equal(jacobian_frobenius(cell.bind(x), z))
    assert not value.requires_grad


def blocks_of(f, z: torch.Tensor) -> list[torch.Tensor]:
    """The Jacobian of each sequence, a matrix."""
    jacobian = torch.autograd.functional.jacobian(f, z)
    return [jacobian[b, :, :, b].flatten(2).flatten(0, 1) for b in range(len(z))]


def test_after_many_power_iterations_it_is_the_squared_spectral_norm_and_never_above_it():
    cell, x, z = cell_at_a_point()
    f = cell.bind(x)
    norms = torch.stack([torch.linalg.matrix_norm(block, 2) for block in blocks_of(f, z)])
    assert abs(norms[0] - norms[1]) > 0.01 * norms[0]
    values = [
        jacobian_spectral(f, z, power_iterations=n, generator=torch.Generator().manual_seed(5)).item()
        for n in (1, 2, 4, 8, 200)
    ]
    exact = norms.square().mean().item()
    assert values == sorted(values)
    assert values[0] < 0.8 * exact
    assert values[-1] == pytest.approx(exact, rel=1e-6)


def test_its_gradient_there_is_that_of_the_squared_spectral_norm():
    cell, x, z = cell_at_a_point()
    inputs = list(cell.bind(x).inputs)
    value = jacobian_spectral(cell.bind(x), z, power_iterations=300, generator=torch.Generator().manual_seed(5))
    found = torch.autograd.grad(value, cell.merge.weight)[0]

    def exact(weight: torch.Tensor) -> torch.Tensor:
        given = [weight if tensor is cell.merge.weight else tensor.detach() for tensor in inputs]
        f = cell.bind(x).with_inputs(given)
        jacobian = torch.autograd.functional.jacobian(f, z, create_graph=True)
        blocks = [jacobian[b, :, :, b].flatten(2).flatten(0, 1) for b in range(len(z))]
        return torch.stack([torch.linalg.matrix_norm(block, 2).square() for block in blocks]).mean()

    expected = torch.autograd.grad(exact(cell.merge.weight), cell.merge.weight)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)


def test_of_an_orthogonal_map_all_gains_are_the_same_and_so_are_both_norms():
    turn = 0.7 * torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    z = torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert jacobian_spectral(lambda z: z @ turn, z, power_iterations=1).item() == pytest.approx(0.49, rel=1e-12)
    draws = [jacobian_frobenius(lambda z: z @ turn, z).item() for _ in range(200)]
    assert sum(draws) / 200 == pytest.approx(0.49, rel=0.05)


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 30, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_spectral_norm_of_a_map_that_is_constant_is_zero_with_a_gradient_that_is_finite(shape, dtype):
    scale = torch.zeros((), dtype=dtype, requires_grad=True)
    value = jacobian_spectral(lambda z: scale * z, torch.ones(shape, dtype=dtype), power_iterations=2)
    (gradient,) = torch.autograd.grad(value, scale)
    assert value == 0
    assert gradient == 0


def test_a_sequence_that_f_does_not_depend_on_adds_nothing_to_the_spectral_norm_of_the_others():
    weight = torch.tensor([0.5, 0.0, 0.5])[:, None, None]
    value = jacobian_spectral(lambda z: weight * z, torch.ones(3, 30, 40), power_iterations=2)
    assert value.item() == pytest.approx(0.25 * 2 / 3)


def test_without_power_iterations_there_is_no_spectral_norm():
    with pytest.raises(ValueError, match=r"power_iterations=0: expected 1 or more \(spectral norm\), or None"):
        jacobian_spectral(torch.sin, torch.zeros(1, 1, 1), power_iterations=0)
    cell, x, z = cell_at_a_point()
    with pytest.raises(ValueError, match="power_iterations=0"):
        jacobian_penalty(cell.bind(x), z, power_iterations=0)


def exact_radius(f, z: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.linalg.eigvals(block).abs().max() for block in blocks_of(f, z)])


@pytest.mark.parametrize("init_std", [0.05, 0.4])
def test_the_spectral_radius_of_a_cell_is_found_for_each_sequence(init_std: float):
    cell, x, z = cell_at_a_point(init_std)
    f = cell.bind(x)
    found = spectral_radius(f, z, num_iterations=400, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(found, exact_radius(f, z), rtol=1e-2, atol=0)
    assert not found.requires_grad
    assert abs(found[0] - found[1]) > 0.01 * found[0]


@pytest.mark.parametrize(
    ("matrix", "radius", "tolerance"),
    [
        ([[math.cos(1.1), -math.sin(1.1)], [math.sin(1.1), math.cos(1.1)]], 1.0, 1e-12),
        ([[0.0, -2.0], [0.5, 0.0]], 1.0, 1e-12),  # a quarter turn, not normal
        ([[1.0, 5.0], [0.0, -0.9]], 1.0, 1e-3),
        ([[1.0, 0.0], [0.0, 0.1]], 1.0, 1e-3),
        ([[0.0, 1.0], [0.0, 0.0]], 0.0, 0.0),  # nilpotent
        ([[1.0, 1.0], [0.0, 1.0]], 1.0, 0.03),  # a single eigenvector: powers grow by a polynomial besides
        ([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0]], 1.0, 0.03),
    ],
)
def test_the_spectral_radius_of_rotations_and_of_non_normal_maps(matrix: list, radius: float, tolerance: float):
    jacobian = 0.9 * torch.tensor(matrix, dtype=torch.float64)
    z = torch.randn(3, 2, len(matrix), dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    found = spectral_radius(lambda z: z @ jacobian.T, z, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(found, torch.full((3,), 0.9 * radius, dtype=torch.float64), rtol=0, atol=tolerance)


def test_the_spectral_radius_of_a_hundred_random_matrices_is_within_three_per_cent():
    generator = torch.Generator().manual_seed(8)
    matrices = torch.randn(100, 20, 20, dtype=torch.float64, generator=generator)
    z = torch.randn(100, 1, 20, dtype=torch.float64, generator=generator)
    found = spectral_radius(lambda z: z @ matrices.mT, z, generator=generator)
    torch.testing.assert_close(found, torch.linalg.eigvals(matrices).abs().amax(dim=1), rtol=0.03, atol=0)


def test_one_iteration_says_nothing_about_growth():
    with pytest.raises(ValueError, match=r"num_iterations=1\): expected 2 or more"):
        spectral_radius(torch.sin, torch.zeros(1, 1, 1), num_iterations=1)


def test_power_iterations_without_an_estimate_are_refused_rather_than_ignored():
    cell, x, _ = cell_at_a_point()
    with pytest.raises(ValueError, match="power_iterations=2 without estimate_jacobian"):
        Equilibrium(cell)(x, power_iterations=2)
