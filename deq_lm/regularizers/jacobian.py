"""How strongly f contracts at the equilibrium: its Jacobian's Frobenius norm, for a loss, and its spectral radius."""

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


def spectral_radius(
    f: Callable[[Tensor], Tensor], z: Tensor, *, num_iterations: int = 100, generator: torch.Generator | None = None
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
        raise ValueError(f"spectral_radius(num_iterations={num_iterations}): expected 2 or more; 100 gives about 1 %.")
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        image = f(z)
    direction = torch.randn(z.shape, dtype=image.dtype, device=z.device, generator=generator)
    growth = []
    for _ in range(num_iterations):
        (product,) = torch.autograd.grad(image, z, direction, retain_graph=True)
        norm = torch.linalg.vector_norm(product.flatten(1), dim=1)  # (B,)
        growth.append(norm.log())
        direction = product / norm.clamp_min(torch.finfo(norm.dtype).tiny).view(-1, *[1] * (product.dim() - 1))
    return torch.stack(growth[num_iterations // 2 :]).mean(dim=0).exp()
