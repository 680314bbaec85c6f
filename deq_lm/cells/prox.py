"""Activations as proximal maps: a(v) = prox_h(v) for a closed convex h, and prox_{step h} with them, element by element.

prox_{step h}(v) minimizes step h(x) + (x - v)^2 / 2. A splitting needs it at its own step; f is that of step 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Prox = Callable[[Tensor, Tensor | float], Tensor]
"""(v, step) -> prox_{step h}(v), both of one shape; step is positive."""

NEWTON_STEPS = 20


def relu(v: Tensor, step: Tensor | float) -> Tensor:
    """h is 0 for x >= 0 and infinite elsewhere: the same projection at every step."""
    return v.relu()


def soft_threshold(v: Tensor, step: Tensor | float, *, threshold: float) -> Tensor:
    """h(x) = threshold |x|: v shrunk by step threshold."""
    return v.sign() * (v.abs() - step * threshold).relu()


def tanh(v: Tensor, step: Tensor | float) -> Tensor:
    """h'(x) = artanh(x) - x, so that prox_h = tanh; at another step x = tanh(y) with step y + (1 - step) tanh(y) = v.

    Newton's method for |y| from |v|, whence it is monotone: for step < 1 the left-hand side is concave and |v| below the
    root, for step > 1 it is convex and |v| above it. 20 iterations reach rounding for steps down to 1e-6. The gradient is
    that of the last iteration alone, which is the root's.
    """
    if isinstance(step, float) and step == 1.0:
        return v.tanh()
    with torch.no_grad():
        target = v.abs()
        y = target
        for _ in range(NEWTON_STEPS):
            y = _newton(y, target, step).clamp_min_(0.0)
        y = torch.copysign(y, v)
    return _newton(y, v, step).tanh()


def _newton(y: Tensor, v: Tensor, step: Tensor | float) -> Tensor:
    """One iteration for y; v alone is recorded."""
    rest = 1 - step
    image = y.tanh()
    slope = 1 - rest * image.square()  # step + (1 - step) (1 - tanh^2)
    return y - (step * y + rest * image - v) / slope
