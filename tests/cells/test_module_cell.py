"""Any module f(z, x) as the cell of an equilibrium: its solution, its gradients, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deq_lm.adjoints import Implicit, Phantom, Reversed, Unrolled
from deq_lm.cells import ModuleCell
from deq_lm.equilibrium import Equilibrium
from deq_lm.solvers import Broyden, Picard, Reversible, StoppingRule

TIGHT = StoppingRule(max_steps=200, rtol=1e-13, patience=40)
EXACT = {"solver": Broyden(), "adjoint": Implicit(stopping=TIGHT), "stopping": TIGHT}


class Affine(nn.Module):
    """A z + x."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False, dtype=torch.float64)
        nn.init.orthogonal_(self.linear.weight, gain=0.7)

    def forward(self, z, x):
        return self.linear(z) + x


class Nested(nn.Module):
    """Submodules, a weight that is used by two of them, a buffer, dropout."""

    def __init__(self, width: int = 4, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.second.weight = self.first.weight
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("shift", torch.linspace(-1, 1, width))
        nn.init.orthogonal_(self.first.weight, gain=0.5)
        self.double()

    def forward(self, z, x):
        return torch.tanh(self.second(self.dropout(torch.tanh(self.first(z)))) + x + self.shift)


class Image(nn.Module):
    """A convolution, of states (B, C, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, dtype=torch.float64)

    def forward(self, z, x):
        return torch.tanh(0.3 * self.conv(z) + x)


class Counting(nn.Module):
    """Keeps a count in a buffer, changed in place or assigned anew."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.register_buffer("count", torch.zeros(()))

    def forward(self, z, x):
        if self.in_place:
            self.count += 1
        else:
            self.count = self.count + 1
        return 0.5 * z + x


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def test_the_solution_and_the_gradients_of_an_affine_module_are_the_closed_form():
    module, x = Affine(), torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    output = Equilibrium(module, **EXACT)(x).output
    cotangent = torch.randn(3, 4, dtype=torch.float64)
    output.backward(cotangent)
    inverse = torch.linalg.inv(torch.eye(4, dtype=torch.float64) - module.linear.weight.detach())
    torch.testing.assert_close(output, x @ inverse.T, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(x.grad, cotangent @ inverse, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(module.linear.weight.grad, (cotangent @ inverse).T @ output, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (Affine(), (2, 4)),
        (Affine(), (2, 3, 4)),
        (Image(), (2, 3, 5, 5)),
        (Affine(), (2, 3, 2, 2, 4)),
    ],
    ids=str,
)
def test_a_state_has_the_shape_of_x_whatever_that_is(module, shape):
    x = torch.randn(shape, dtype=torch.float64)
    segment = Equilibrium(module, **EXACT)(x)
    assert segment.output.shape == x.shape
    assert segment.memory is None
    assert segment.solution.converged.all()
    torch.testing.assert_close(segment.output, module(segment.output, x), rtol=1e-10, atol=1e-10)
    segment.output.sum().backward()
    assert all(parameter.grad.norm() > 0 for parameter in module.parameters())


def test_the_gradient_of_a_nested_module_with_a_tied_weight_a_buffer_and_dropout_is_that_of_finite_differences():
    module = Nested(dropout=0.5)
    equilibrium = Equilibrium(module, **EXACT)

    def solve(x, *_parameters):
        torch.manual_seed(1)  # the mask
        return equilibrium(x).output

    x = torch.randn(1, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(solve, (x, *module.parameters()), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("solver", "adjoint"), [(Picard(), Unrolled()), (Broyden(), Phantom(num_steps=60)), (Reversible(), Reversed())]
)
def test_the_other_adjoints_have_the_same_gradient(solver, adjoint):
    module, x = Nested(dropout=0.2), torch.randn(2, 4, dtype=torch.float64)

    def gradient(**settings):
        torch.manual_seed(1)
        module.zero_grad()
        Equilibrium(module, **settings)(x).output.square().sum().backward()
        return [parameter.grad.clone() for parameter in module.parameters()]

    exact, other = gradient(**EXACT), gradient(solver=solver, adjoint=adjoint, stopping=TIGHT)
    for ours, theirs in zip(exact, other, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_one_dropout_mask_a_solve_another_in_the_next_and_the_callers_random_numbers_go_on():
    module, x = Nested(dropout=0.5), torch.randn(2, 64, 4, dtype=torch.float64)
    cell = ModuleCell(module)
    f, g = cell.bind(x), cell.bind(x)
    z = torch.randn(2, 1, 64, 4, dtype=torch.float64)
    state = torch.get_rng_state()
    assert torch.equal(f(z), f(z))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(f(z), g(z))
    segment = Equilibrium(module, **EXACT)(x)
    assert segment.solution.converged.all()


def test_by_default_the_state_is_one_position_and_a_causal_module_may_have_its_prefixes_solved():
    class Shift(nn.Module):
        def forward(self, z, x):
            return 0.5 * torch.tanh(z.roll(1, dims=1)).index_fill(1, torch.tensor([0]), 0.0) + x

    x = torch.randn(2, 6, 3, dtype=torch.float64)
    changed = x.clone()
    changed[:, 4:] += 10.0
    loose = StoppingRule(max_steps=3, rtol=0.0)
    whole, prefixes = (
        Equilibrium(Shift(), stopping=loose),
        Equilibrium(ModuleCell(Shift(), causal=True), stopping=loose),
    )
    assert whole(x).solution.position_num_steps.shape == (2, 1)
    assert prefixes(x).solution.position_num_steps.shape == (2, 6)
    assert torch.equal(prefixes(x).output[:, :4], prefixes(changed).output[:, :4])
    assert not torch.equal(whole(x).output[:, :4], whole(changed).output[:, :4])


@pytest.mark.parametrize("adjoint", [Implicit(), Phantom()])
def test_under_autocast_the_gradient_is_that_of_float32_to_the_precision_of_bfloat16(adjoint):
    module, x = Nested().float(), torch.randn(2, 4)
    equilibrium = Equilibrium(module, adjoint=adjoint, stopping=StoppingRule(rtol=1e-2))
    gradients = []
    for enabled in (False, True):
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = equilibrium(x).output
        assert output.dtype == torch.float32
        output.sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in module.parameters()]))
    exact, rounded = gradients
    assert (rounded - exact).norm() < 0.03 * exact.norm()


def test_its_jacobian_is_estimated_unless_it_draws_a_mask_for_the_whole_batch():
    x = torch.randn(8, 3, 4, dtype=torch.float64)
    module = Nested()
    segment = Equilibrium(module, **EXACT)(x, estimate_jacobian=True)
    (segment.output.sum() + segment.jacobian).backward()
    assert 0 < segment.jacobian < 1
    assert module.first.weight.grad.norm() > 0
    with pytest.raises(ValueError, match="Nested draws random numbers, and here for a part of the batch"):
        Equilibrium(Nested(dropout=0.5), **EXACT)(x, estimate_jacobian=True)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_module_that_keeps_count_is_refused_and_its_buffers_are_left_alone(in_place):
    module = Counting(in_place=in_place)
    with pytest.raises(ValueError, match="Counting changes count when it is called"):
        Equilibrium(module)(torch.randn(2, 4))
    assert module.count == 0


def test_batch_statistics_are_refused_and_running_ones_are_not():
    class Normalized(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, z, x):
            return torch.tanh(0.3 * self.norm(z) + x)

    module, x = Normalized(), torch.randn(8, 4)
    with pytest.raises(ValueError, match=r"BatchNorm1d \(norm\) with the statistics of the batch"):
        Equilibrium(module)(x)
    module.eval()
    assert Equilibrium(module)(x).solution.converged.all()
    module.norm = nn.BatchNorm1d(4, track_running_stats=False)
    with pytest.raises(ValueError, match="statistics of the batch"):
        Equilibrium(module.eval())(x)


def test_what_a_plain_module_does_not_know_is_refused():
    equilibrium = Equilibrium(Affine())
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="key_mask with Affine: a plain module"):
        equilibrium(x, key_mask=torch.ones(2, 3, dtype=torch.bool))

    class Wider(nn.Module):
        def forward(self, z, x):
            return torch.cat([z, x], dim=-1)

    with pytest.raises(ValueError, match=r"Wider maps z and x of shape \(2, 4\) to \(2, 8\)"):
        Equilibrium(Wider())(torch.randn(2, 4))


def test_its_parameters_are_the_modules_and_are_drawn_anew_by_it():
    module = Nested()
    equilibrium = Equilibrium(module)
    assert [*equilibrium.state_dict()] == [f"cell.module.{name}" for name in module.state_dict()]
    before = module.first.weight.clone()
    equilibrium.cell.reset_parameters()
    assert not torch.equal(module.first.weight, before)
