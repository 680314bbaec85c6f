"""Solves and gradients on a GPU are those of a CPU, and no position sees a later one."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from torch import Tensor

from deq_lm.adjoints import Adjoint, Implicit, Phantom, Reversed
from deq_lm.cells import TransformerXLCell, TransformerXLConfig
from deq_lm.cells.base import BoundCell, Cell
from deq_lm.cells.monotone import MonotoneCell, MonotoneConfig
from deq_lm.regularizers import jacobian_penalty
from deq_lm.solvers import (
    Anderson,
    Broyden,
    FixedPointSolver,
    ForwardBackward,
    Outcome,
    PeacemanRachford,
    Picard,
    Reversible,
    StoppingRule,
    solve,
)
from deq_lm.solvers.lattice import Lattice

DEVICE = torch.device("cuda")
BATCH, LENGTH, WIDTH = 3, 12, 16
RULE = StoppingRule(max_steps=300, rtol=1e-9, patience=100)

SOLVERS = [
    solver(scope=scope, **options)
    for scope in ("prefix", "sequence")
    for solver, options in [
        (Picard, {}),
        (Reversible, {"relaxation": 0.5}),
        (Anderson, {}),
        (Broyden, {}),
        (Broyden, {"history_size": 12, "half_precision_history": True}),
        (ForwardBackward, {}),
        (PeacemanRachford, {}),
    ]
]
every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: str(solver).replace(" ", ""))


def cell_for(solver: FixedPointSolver) -> Cell:
    """A contraction, in float64, that the solver can solve."""
    torch.manual_seed(0)
    if solver.needs_proximal_form:
        return MonotoneCell(MonotoneConfig(d_model=WIDTH, mem_len=0, init_std=0.2)).double()
    return contraction(TransformerXLConfig(d_model=WIDTH, num_heads=2, d_inner=24, mem_len=0, init_std=0.2)).double()


def contraction(config: TransformerXLConfig) -> TransformerXLCell:
    cell = TransformerXLCell(config)
    with torch.no_grad():
        cell.qkv.weight *= 0.5
        cell.inject.weight *= 4.0
    return cell


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*(shape or (BATCH, LENGTH, WIDTH)), generator=torch.Generator().manual_seed(seed)).double()


@every_solver
def test_a_solve_is_that_of_the_cpu(solver: FixedPointSolver):
    cell, x = cell_for(solver), inputs()
    solutions = []
    for device in (torch.device("cpu"), DEVICE):
        with torch.no_grad():
            f = cell.to(device).bind(x.to(device))
            solutions.append(solve(f, torch.zeros_like(x, device=device), solver=solver, stopping=RULE))
    on_cpu, on_gpu = solutions
    assert on_gpu.z.device.type == DEVICE.type
    assert on_gpu.outcome.tolist() == on_cpu.outcome.tolist() == [Outcome.CONVERGED] * BATCH
    slack = 5 if getattr(solver, "half_precision_history", False) else 2  # rounding tells where a tolerance is near
    assert (on_gpu.num_evaluations.cpu() - on_cpu.num_evaluations).abs().max() <= slack
    torch.testing.assert_close(on_gpu.z.cpu(), on_cpu.z, rtol=0, atol=1e-7)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("solver", [Broyden(), Anderson(), Picard(relaxation=0.7)], ids=lambda s: type(s).__name__)
def test_later_inputs_change_no_bit_of_an_unconverged_iterate(solver: FixedPointSolver, precision: str):
    """Of one shape, every kernel sums the same numbers in the same order."""
    cell = cell_for(solver).float().to(DEVICE)
    x = inputs(4, 192, WIDTH).float().to(DEVICE)
    changed = x.clone()
    changed[:, 100:] = inputs(4, 92, WIDTH, seed=2).to(changed)
    states = []
    with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bfloat16"):
        for given in (x, changed):
            rule = StoppingRule(max_steps=6, rtol=1e-5)
            states.append(solve(cell.bind(given), torch.zeros_like(given), solver=solver, stopping=rule).z)
    assert torch.equal(states[0][:, :100], states[1][:, :100])
    assert not torch.equal(states[0][:, 100:], states[1][:, 100:])


def test_a_solve_of_more_units_than_a_batched_kernel_takes_at_once():
    """Libraries count the matrices of a batch in 16 bits, and there is one a position."""
    offset = inputs(8, 9000, 2).to(DEVICE)
    factors = torch.tensor([0.5, -0.7], dtype=torch.float64, device=DEVICE)
    solution = solve(lambda z: z * factors + offset, torch.zeros_like(offset), solver=Broyden(), stopping=RULE)
    assert solution.outcome.tolist() == [Outcome.CONVERGED] * 8
    torch.testing.assert_close(solution.z, offset / (1 - factors), rtol=1e-5, atol=1e-5)


ADJOINTS = [
    (Broyden(), Implicit(stopping=RULE)),
    (Broyden(), Implicit(solver=Anderson(), stopping=RULE)),
    (Broyden(), Phantom()),
    (PeacemanRachford(), Implicit(solver=PeacemanRachford(), stopping=RULE)),
    (Reversible(relaxation=0.5), Reversed()),
]


@pytest.mark.parametrize(
    ("solver", "adjoint"), ADJOINTS, ids=lambda value: str(value).partition("(")[0] + str(value).count("Anderson") * "A"
)
def test_a_gradient_is_that_of_the_cpu_whatever_the_size_of_the_loss(solver: FixedPointSolver, adjoint: Adjoint):
    cell, x, cotangent = cell_for(solver), inputs(), inputs(seed=3)

    def gradient(device: torch.device, scale: float) -> list[Tensor]:
        cell.to(device)
        f, start = cell.bind(x.to(device)), torch.zeros_like(x, device=device)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a reversal that misses its start
            output, _ = adjoint.apply(f, start, partial(solve, solver=solver, stopping=RULE))
            found = torch.autograd.grad(
                output, list(cell.parameters()), scale * cotangent.to(device), materialize_grads=True, allow_unused=True
            )
        return [tensor.cpu() / scale for tensor in found]

    on_cpu = gradient(torch.device("cpu"), 1.0)
    for scale in (1.0, 1e-8):
        for ours, theirs in zip(gradient(DEVICE, scale), on_cpu, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * max(1.0, theirs.abs().max().item()))


def test_the_spacing_of_the_lattice_is_a_power_of_two():
    sizes = torch.exp2(torch.arange(-100.0, 100.0, dtype=torch.float64))[None, :, None].to(DEVICE) * 1.7
    lattice = Lattice.around(torch.zeros_like(sizes), sizes.flip(1), "prefix", 0.5)
    assert (torch.frexp(lattice.quantum).mantissa == 0.5).all()


@pytest.mark.parametrize("length", [64, 128, 200])
def test_a_recorded_evaluation_under_autocast_has_the_gradients_of_float32(length: int):
    """Whatever attention kernel is chosen for its additive bias, which needs a gradient, at this number of keys."""
    torch.manual_seed(0)
    cell = contraction(TransformerXLConfig(d_model=64, num_heads=4, d_inner=64, mem_len=0, init_std=0.1)).to(DEVICE)
    z, x, cotangent = (inputs(4, length, 64, seed=seed).float().to(DEVICE) for seed in range(3))
    z.requires_grad_()
    images, gradients = [], []
    for enabled in (False, True):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=enabled):
            image = cell.bind(x)(z)
        images.append(image)
        gradients.append(torch.autograd.grad(image, [z, *cell.parameters()], cotangent))
    assert relative(images[1], images[0]) < 0.02
    for name, ours, exact in zip(["z", *dict(cell.named_parameters())], *reversed(gradients), strict=True):
        assert relative(ours, exact) < 0.2, name


@pytest.mark.parametrize("recompute", ["none", "feed_forward", "block"])
def test_the_jacobian_penalty_and_its_gradient_are_those_of_the_cpu_however_f_is_recomputed(recompute, monkeypatch):
    config = TransformerXLConfig(d_model=WIDTH, num_heads=2, d_inner=24, mem_len=0, init_std=0.2, recompute=recompute)
    x, z, probe = (inputs(seed=seed).float() for seed in range(3))
    monkeypatch.setattr(torch, "randn", lambda shape, *, device, **_: probe[: shape[0]].to(device))
    found = []
    for device in (torch.device("cpu"), DEVICE):
        torch.manual_seed(0)
        cell = contraction(config).to(device).train()
        penalty = jacobian_penalty(cell.bind(x.to(device)), z.to(device))
        (gradient,) = torch.autograd.grad(penalty, [cell.qkv.weight])
        found.append((penalty.item(), gradient.cpu()))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4)
    assert relative(found[1][1], found[0][1]) < 1e-3


@pytest.mark.parametrize("solver", [Broyden(), Anderson(scope="sequence")], ids=lambda s: type(s).__name__)
def test_a_tolerance_finer_than_bfloat16_stalls_at_its_floor(solver: FixedPointSolver):
    torch.manual_seed(0)
    cell = contraction(TransformerXLConfig(d_model=64, num_heads=4, d_inner=64, mem_len=0, init_std=0.1)).to(DEVICE)
    x = inputs(8, 64, 64).float().to(DEVICE)
    with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16):
        f = cell.bind(x)
        rule = StoppingRule(max_steps=60, rtol=1e-5)
        solution = solve(f, torch.zeros_like(x), solver=solver, stopping=rule)
    assert isinstance(f, BoundCell)
    assert solution.z.dtype == torch.float32
    assert solution.outcome.tolist() == [Outcome.STALLED] * 8
    assert solution.relative_residual.max() < 2.0**-5
    assert solution.num_evaluations.max() <= 40


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()
