"""The implicit gradient of any contraction, whatever its size and whichever solver, is the gradient of unrolling it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from contractions import Contraction, contractions
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deq_lm.adjoints import Adjoint, Implicit, Unrolled
from deq_lm.solvers import Anderson, Broyden, FixedPointSolver, Picard, StoppingRule, solve

TIGHT = StoppingRule(max_steps=2000, rtol=1e-11, patience=300)
SOLVERS = [solver(scope=scope) for solver in (Picard, Anderson, Broyden) for scope in ("prefix", "sequence")]


def gradients(
    f: Contraction, adjoint: Adjoint, solver: FixedPointSolver, rule: StoppingRule, seed: int
) -> tuple[Tensor, ...]:
    """Of a random loss, with respect to A and x."""
    f = f.with_inputs([tensor.clone().requires_grad_() for tensor in f.inputs])
    output, _ = adjoint.apply(f, torch.zeros_like(f.x), partial(solve, solver=solver, stopping=rule))
    cotangent = torch.randn(f.x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.autograd.grad(output, f.inputs, cotangent)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: f"{type(s).__name__}-{s.scope}")
@settings(deadline=None, derandomize=True, max_examples=6)  # fixed examples
@given(f=contractions(), seed=st.integers(0, 2**16))
def test_the_implicit_gradient_is_the_unrolled_one(solver: FixedPointSolver, f: Contraction, seed: int):
    found = gradients(f, Implicit(solver=solver, stopping=TIGHT), solver, TIGHT, seed)
    unrolled = StoppingRule.fixed(300)  # 0.94^300 < 1e-8
    wanted = gradients(f, Unrolled(), Picard(), unrolled, seed)
    for a, b in zip(found, wanted, strict=True):
        assert torch.dist(a, b) <= 1e-6 * b.norm()
