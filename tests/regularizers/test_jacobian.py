"""The estimate against explicit Jacobians."""

import torch

from deq_lm.cells import TransformerXLCell, TransformerXLConfig
from deq_lm.regularizers import jacobian_frobenius


def cell_at_a_point():
    torch.manual_seed(0)
    cell = TransformerXLCell(TransformerXLConfig(d_model=8, num_heads=2, d_inner=8, init_std=0.4)).double()
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
