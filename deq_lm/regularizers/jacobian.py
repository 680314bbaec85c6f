"""How strongly f contracts at the equilibrium: a norm of its Jacobian, for a loss, and its spectral radius."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from deq_lm.cells.base import BoundCell

PENALTY_PARTS = 4
"""Parts of a batch `jacobian_penalty` goes through one after the other: the fewest that need less memory than the rest of a
training step does."""


def jacobian_frobenius(f: Callable[[Tensor], Tensor], z: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Hutchinson's estimate of ||df/dz||_F^2 / z.numel(), from one normal vector e: ||e^T df/dz||^2 / z.numel().

    Differentiable with respect to what f reads (a second backward pass through one evaluation); z is held constant.

    Args:
        f: the map.
        z: where, (B, L, D).
        generator: draws e; None is the global one.

    Returns:
        0-dim; an estimate of the mean of the squared singular values, so below 1 for a contraction (but the largest may be
        above 1 all the same).

    References:
        Bai, Koltun, Kolter 2021, "Stabilizing equilibrium models by Jacobian regularization", equation 8.
    """
    return _mean_gain(f, z, None, generator)


def jacobian_spectral(
    f: Callable[[Tensor], Tensor], z: Tensor, *, power_iterations: int, generator: torch.Generator | None = None
) -> Tensor:
    """An estimate of the squared spectral norm ||df/dz||_2^2, a mean over the sequences: ||u^T df/dz||^2 of unit vectors u.

    u, one a sequence, is a normal vector after some power iterations with J J^T, and held constant: at the leading singular
    vector, the gradient is that of the squared norm itself. The estimate is never above it, and rises with every iteration.
    Without any it would be `jacobian_frobenius`, the mean of the squared gains ||u^T df/dz||^2 over all directions; this is
    the largest of them. So it is the larger of the two, and the same weight a stronger regularization.

    Differentiable as `jacobian_frobenius` is. An iteration costs a product with J^T and one with J.

    Args:
        f: the map; no sequence may influence another.
        z: where, (B, L, D).
        power_iterations: 1 or more.
        generator: draws the first u; None is the global one.

    Returns:
        0-dim.

    Raises:
        ValueError: if power_iterations is below 1.

    References:
        Yoshida and Miyato 2017, "Spectral norm regularization for improving the generalizability of deep learning",
        algorithm 1: there for weights, here for df/dz, which is known by its products alone.
    """
    return _mean_gain(f, z, power_iterations, generator)


def _mean_gain(
    f: Callable[[Tensor], Tensor], z: Tensor, power_iterations: int | None, generator: torch.Generator | None
) -> Tensor:
    """||u^T df/dz||^2 / z.numel() of a normal vector u, after so many power iterations, if there are any."""
    if power_iterations is not None and power_iterations < 1:
        raise ValueError(
            f"power_iterations={power_iterations}: expected 1 or more (spectral norm), or None (Frobenius norm)."
        )
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no second derivative
        z = z.detach().requires_grad_()
        image = f(z)
        direction = torch.randn(z.shape, dtype=image.dtype, device=z.device, generator=generator)
        if power_iterations is not None:
            direction = _turned_to_the_largest_gain(image, z, direction, power_iterations)
        (product,) = torch.autograd.grad(image, z, direction, create_graph=True)
    return product.square().sum() / z.numel()


def _turned_to_the_largest_gain(image: Tensor, z: Tensor, direction: Tensor, num_iterations: int) -> Tensor:
    """`direction` after power iterations with J J^T, of the length in each sequence that a normal vector has on average."""
    length = (z.numel() / len(z)) ** 0.5
    any_vector = torch.zeros_like(direction, requires_grad=True)
    (transposed,) = torch.autograd.grad(image, z, any_vector, create_graph=True)  # linear in it: its derivative is J
    for _ in range(num_iterations):
        (pulled,) = torch.autograd.grad(image, z, direction, retain_graph=True)
        (pushed,) = torch.autograd.grad(transposed, any_vector, pulled, retain_graph=True)
        # Where J is 0, `pushed` stays 0: length / tiny would be inf, and 0 times that NaN.
        direction = pushed * (length / _norms(pushed).clamp_min(length * torch.finfo(pushed.dtype).tiny))
    return direction


def _norms(x: Tensor) -> Tensor:
    """Of each sequence, (B, 1, ...)."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1).view(-1, *[1] * (x.dim() - 1))


def jacobian_penalty(f: BoundCell, z: Tensor, *, power_iterations: int | None = None) -> Tensor:
    """`jacobian_frobenius` or, by power iterations, `jacobian_spectral`, to be added to a loss, in little memory.

    The second backward pass runs here and not in that of the loss, one part of the sequences after the other: what is kept
    until then is a gradient as large as the inputs of f, and not the graph of two passes through an evaluation.

    Args:
        f: the map, with its inputs in the caller's graph.
        z: where, (B, L, D).
        power_iterations: 1 or more, or None.

    Returns:
        0-dim; its gradient flows to the inputs of f, and has itself none.

    Raises:
        ValueError: if power_iterations is below 1.
    """
    if torch.is_grad_enabled() and f.inputs:
        return _Penalty.apply(f, z, power_iterations, *f.inputs)
    return _mean_gain(f, z, power_iterations, None)


class _Penalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, f: BoundCell, z: Tensor, power_iterations: int | None, *inputs: Tensor) -> Tensor:
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        f = f.with_inputs(leaves)
        value, gradients = z.new_zeros(()), [torch.zeros_like(tensor) for tensor in inputs]
        size = math.ceil(len(z) / PENALTY_PARTS)
        with sdpa_kernel(SDPBackend.MATH):  # also for what is recomputed in the second pass
            for start in range(0, len(z), size):
                part = slice(start, start + size)
                with torch.enable_grad():
                    of_part = _mean_gain(f.select(part), z[part], power_iterations, None) * (len(z[part]) / len(z))
                value += of_part.detach()
                for gradient, own in zip(
                    gradients, torch.autograd.grad(of_part, leaves, allow_unused=True), strict=True
                ):
                    if own is not None:
                        gradient += own
        ctx.save_for_backward(*gradients)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (scale,) = grad_outputs
        return None, None, None, *(scale * gradient for gradient in ctx.saved_tensors)


def spectral_radius(
    f: Callable[[Tensor], Tensor], z: Tensor, *, num_iterations: int = 200, generator: torch.Generator | None = None
) -> Tensor:
    """The largest modulus of an eigenvalue of df/dz at z, one per sequence; plain iteration converges if it is below 1.

    Powers of the transposed Jacobian are applied to a random vector, and the mean logarithm of the norm's growth is taken
    over the second half of them. The growth is right where the dominant eigenvalues are complex and the vector keeps
    turning; the Rayleigh quotient is not (for a rotation scaled by 0.9 it is anything in [-0.9, 0.9]).

    Args:
        f: the map; no sequence may influence another.
        z: where, (B, L, D).
        num_iterations: products with the Jacobian, 2 or more. The error falls as 1 / num_iterations, with a factor that
            grows with the Jacobian's departure from normality.
        generator: draws the start; None is the global one.

    Returns:
        (B,), without gradient; 0 where a power of the Jacobian vanishes.

    Raises:
        ValueError: if num_iterations is below 2.
    """
    if num_iterations < 2:
        raise ValueError(f"spectral_radius(num_iterations={num_iterations}): expected 2 or more; 200 are within 3 %.")
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        image = f(z)
    direction = torch.randn(z.shape, dtype=image.dtype, device=z.device, generator=generator)
    growth = []
    for _ in range(num_iterations):
        (product,) = torch.autograd.grad(image, z, direction, retain_graph=True)
        norms = _norms(product)
        growth.append(norms.flatten().log())
        direction = product / norms.clamp_min(torch.finfo(norms.dtype).tiny)
    return torch.stack(growth[num_iterations // 2 :]).mean(dim=0).exp()
