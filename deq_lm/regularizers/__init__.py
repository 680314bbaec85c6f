"""What keeps f solvable."""

from deq_lm.regularizers.jacobian import jacobian_frobenius, jacobian_penalty, jacobian_spectral, spectral_radius

__all__ = ["jacobian_frobenius", "jacobian_penalty", "jacobian_spectral", "spectral_radius"]
