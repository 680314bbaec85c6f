"""What keeps f solvable."""

from deq_lm.regularizers.jacobian import jacobian_frobenius, spectral_radius

__all__ = ["jacobian_frobenius", "spectral_radius"]
