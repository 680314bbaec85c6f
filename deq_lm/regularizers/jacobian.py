"""How strongly f contracts at the equilibrium: the Frobenius norm of its Jacobian, estimated and differentiable."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def jacobian_frobenius(f: Callable[[Tensor], Tensor], z: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Hutchinson's estimate of ||df/dz||_F^2 / z.numel(), from one normal vector e: ||e^T df/dz||^2 / z.numel().

    Differentiable with respect to what f reads (a second backward pass through one evaluation); z is held constant.

    Args:
        f: the map.
        z: where, (B, L, D).
        generator: draws e; None is the global one.

    Returns:
        0-dim; about the square of the mean singular value, so below 1 for a contraction.

    References:
        Bai, Koltun, Kolter 2021, "Stabilizing equilibrium models by Jacobian regularization", equation 8.
    """
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no second derivative
        z = z.detach().requires_grad_()
        image = f(z)
        direction = torch.randn(z.shape, dtype=image.dtype, device=z.device, generator=generator)
        (product,) = torch.autograd.grad(image, z, direction, create_graph=True)
    return product.square().sum() / z.numel()
