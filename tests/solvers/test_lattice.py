"""The arithmetic of reversible steps, to the last bit."""

import math

import pytest
import torch

from deq_lm.solvers.lattice import FRACTION_BITS, Lattice, pop, push

SHAPE = (2, 3, 50)
RELAXATIONS = [0.01, 0.2, 0.5, 0.7, 0.8, 0.95, 0.999]
every_relaxation = pytest.mark.parametrize("relaxation", RELAXATIONS)


def lattice(relaxation: float, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Lattice:
    z = torch.full(SHAPE, scale, dtype=dtype)
    return Lattice.around(torch.zeros_like(z), z, "prefix", relaxation)


def multiples(bits: int) -> torch.Tensor:
    numbers = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).mul(2.0**bits).round()
    numbers[0, 0, :9] = torch.arange(-4.0, 5.0)
    return numbers.clamp(-(2.0**51), 2.0**51)


@pytest.mark.parametrize("bits", [3, 32, 51])
@every_relaxation
def test_a_shrunk_number_and_its_lost_digit_give_back_the_number(relaxation: float, bits: int):
    grid, numbers = lattice(relaxation), multiples(bits)
    shrunk = grid.shrink(numbers)
    digit = grid.lost(numbers, shrunk)
    assert (shrunk - (1 - relaxation) * numbers).abs().max() <= 0.5
    assert digit.min() >= 0
    assert digit.max() < grid.radix
    assert torch.equal(grid.undo_shrink(shrunk, digit), numbers)


@every_relaxation
def test_a_digit_has_few_values_and_a_word_holds_as_many_digits_as_fit(relaxation: float):
    grid = lattice(relaxation)
    assert grid.radix <= 1.25 / (1 - relaxation) + 2.25
    assert grid.radix**grid.digits_per_word < 2**63 <= grid.radix ** (grid.digits_per_word + 1)


@every_relaxation
def test_words_give_back_all_digits_of_the_active_units_in_reverse_order(relaxation: float):
    grid = lattice(relaxation)
    generator = torch.Generator().manual_seed(0)
    num_steps = 3 * grid.digits_per_word + 2
    last = torch.randint(num_steps + 1, SHAPE[:2], generator=generator)  # each unit stops at its own step
    words, digits = (), []
    for step in range(num_steps):
        digits.append(torch.randint(grid.radix, SHAPE, generator=generator))
        digits[-1][..., 0] = grid.radix - 1  # the largest number there is
        words = push(words, grid, step, digits[-1], last > step)
    assert len(words) == 4
    words = list(words)
    for step in reversed(range(num_steps)):
        active = last > step
        assert torch.equal(pop(words, grid, step, active)[active], digits[step][active])
    assert not any(word.any() for word in words)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 3.0, 1e30])
def test_the_spacing_is_a_power_of_two_below_the_size_of_the_unit(dtype: torch.dtype, scale: float):
    grid = lattice(0.5, dtype, scale)
    assert grid.quantum.dtype == torch.float64
    assert grid.quantum.shape == (2, 3, 1)
    assert math.frexp(grid.quantum[0, 0, 0].item())[0] == 0.5
    ratio = scale / grid.quantum * 2.0 ** -FRACTION_BITS[dtype]
    assert ((ratio >= 0.49) & (ratio <= 1.01)).all()
    z = torch.rand(SHAPE, dtype=dtype, generator=torch.Generator().manual_seed(0)) * scale
    error = (grid.read(grid.place(z), dtype) - z).abs().max()
    assert error <= (0 if dtype == torch.float32 and scale == 0 else 0.5 * grid.quantum.max())


def test_the_spacing_of_a_prefix_follows_its_largest_position_and_knows_no_later_one():
    image = torch.tensor([1.0, 0.0, 8.0, 2.0], dtype=torch.float64).view(1, 4, 1)
    prefix, sequence = (
        Lattice.around(0 * image, image, scope, 0.5).quantum.flatten() for scope in ("prefix", "sequence")
    )
    assert (prefix / prefix[0]).tolist() == [1, 1, 8, 8]
    assert sequence.tolist() == [prefix[-1].item()]


def test_rounding_is_the_identity_for_a_gradient():
    grid = lattice(0.8)
    z = torch.linspace(-1, 1, 50, dtype=torch.float64).expand(SHAPE).clone().requires_grad_()
    out = grid.read(grid.shrink(grid.place(z)) + grid.increment(z), torch.float64)
    assert torch.equal(
        out.detach(), grid.read(grid.shrink(grid.place(z.detach())) + grid.increment(z.detach()), z.dtype)
    )
    (gradient,) = torch.autograd.grad(out.sum(), z)
    torch.testing.assert_close(gradient, torch.ones_like(z), rtol=1e-12, atol=0)
