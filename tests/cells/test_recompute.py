"""Chunks and recomputation change what is kept in memory, and not a bit of a value."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from deq_lm.adjoints import Implicit
from deq_lm.cells import Memory, TransformerXLCell, TransformerXLConfig
from deq_lm.equilibrium import Equilibrium
from deq_lm.evaluation.peak_memory import peak_live_bytes, saved_bytes
from deq_lm.regularizers import jacobian_frobenius, jacobian_penalty, jacobian_spectral
from deq_lm.solvers import Picard, StoppingRule

BATCH, LENGTH, WIDTH, INNER = 2, 40, 16, 1024
VARIANTS = [
    {"ffn_chunks": 5},
    {"ffn_chunks": 4},  # of 80 rows: the last part is smaller
    {"recompute": "feed_forward"},
    {"ffn_chunks": 4, "recompute": "feed_forward"},
    {"recompute": "block"},
    {"ffn_chunks": 4, "recompute": "block"},
]
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)


def make(dtype: torch.dtype = torch.float64, **variant) -> TransformerXLCell:
    torch.manual_seed(0)
    config = TransformerXLConfig(d_model=WIDTH, num_heads=2, d_inner=INNER, init_std=0.2, **variant)
    return TransformerXLCell(config).to(dtype).train()


def states(seed: int, length: int = LENGTH) -> Tensor:
    return torch.randn(BATCH, length, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("gate", [None, "highway"])
@every_variant
def test_values_are_those_without_to_the_bit_and_gradients_to_rounding(variant: dict, gate: str | None):
    results = []
    for cell in (make(dropout=0.3, gate=gate), make(dropout=0.3, gate=gate, **variant)):
        torch.manual_seed(1)  # of the dropout masks
        z, x = states(1).requires_grad_(), states(2).requires_grad_()
        image = cell.bind(x, Memory(states(3, 4), states(4, 4)))(z)
        gradients = torch.autograd.grad(image, [z, x, *cell.parameters()], states(5))
        results.append([image, *gradients])
    assert torch.equal(results[0][0], results[1][0])
    for a, b in zip(*results, strict=True):  # a sum over all rows is one of sums over chunks
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13 * a.abs().max().item() if "ffn_chunks" in variant else 0)


def test_the_jacobian_penalty_recomputes_attention_by_the_kernel_it_was_computed_by(monkeypatch):
    """On a GPU others would be chosen for the second pass, which save other tensors and have no second derivative."""
    fused = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def noted(*arguments, **options) -> Tensor:
        kernels = torch.backends.cuda
        fused.append(kernels.mem_efficient_sdp_enabled() or kernels.flash_sdp_enabled() or kernels.cudnn_sdp_enabled())
        return attention(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    cell = make(recompute="block")
    jacobian_penalty(cell.bind(states(2).requires_grad_()), states(1)).backward()
    assert len(fused) > BATCH  # those of the second pass, too
    assert not any(fused)


@pytest.mark.parametrize(
    "estimate", [jacobian_frobenius, partial(jacobian_spectral, power_iterations=2)], ids=["frobenius", "spectral"]
)
@every_variant
def test_the_gradient_of_the_jacobian_penalty_is_the_same(variant: dict, estimate: Callable):
    results = []
    for cell in (make(), make(**variant)):
        torch.manual_seed(1)  # of the probe
        penalty = estimate(cell.bind(states(2)), states(1))
        results.append([penalty, *torch.autograd.grad(penalty, list(cell.parameters()), allow_unused=True)])
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


@every_variant
def test_under_autocast_what_is_recomputed_is_what_was_computed(variant: dict):
    results = []
    for cell in (make(torch.float32), make(torch.float32, **variant)):
        with torch.autocast("cpu", torch.bfloat16):
            f = cell.bind(states(2).float())
        results.append(torch.autograd.grad(f(states(1).float()).sum(), list(cell.parameters())))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * a.abs().max().item())


def test_recomputed_tensors_are_not_saved():
    def saved(**variant) -> int:
        cell, x = make(**variant), states(2)
        z = states(1).requires_grad_()
        f = cell.bind(x)
        return saved_bytes(lambda: f(z), besides=[z, x, *f.tensors.values()])

    hidden = BATCH * LENGTH * INNER * 8
    everything, without_hidden = saved(), saved(recompute="feed_forward")
    assert everything - without_hidden == hidden
    assert saved(ffn_chunks=4, recompute="feed_forward") == without_hidden
    assert saved(recompute="block") == 0


def test_chunks_bound_the_hidden_tensors_that_are_there_at_once():
    def peak(*, step: bool = False, **variant) -> int:
        cell, z = make(**variant), states(1).requires_grad_(step)
        f = cell.bind(states(2))

        def run() -> None:
            with torch.set_grad_enabled(step):
                image = f(z)
            if step:
                torch.autograd.grad(image, [z, *cell.parameters()], torch.ones_like(image))

        return peak_live_bytes(run)

    hidden = BATCH * LENGTH * INNER * 8
    in_chunks = peak(ffn_chunks=5)
    assert peak() - in_chunks > 0.5 * hidden
    chunked = {"ffn_chunks": 5, "recompute": "feed_forward"}
    assert peak(step=True, recompute="feed_forward") - peak(step=True, **chunked) > hidden


@every_variant
@pytest.mark.parametrize("mixed_precision", [False, True])
def test_the_implicit_gradient_through_many_backward_passes_is_the_same(variant: dict, mixed_precision: bool):
    results = []
    rule = StoppingRule.fixed(6)
    for options in ({}, variant):
        cell = make(torch.float32, dropout=0.2, **options)
        layer = Equilibrium(cell, solver=Picard(), stopping=rule, adjoint=Implicit(solver=Picard(), stopping=rule))
        torch.manual_seed(1)  # of the dropout masks
        x = states(2).float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision):
            output = layer(x).output
        results.append([output, *torch.autograd.grad(output, [x, *cell.parameters()], states(5).float())])
        assert layer.adjoint_solution is not None
        assert layer.adjoint_solution.num_steps.tolist() == [6] * BATCH
    tolerance = 2e-2 if mixed_precision else 1e-4
    for a, b in zip(*results, strict=True):
        assert torch.dist(a, b) <= tolerance * a.norm()
