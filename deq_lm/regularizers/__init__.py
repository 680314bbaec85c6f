"""What keeps f solvable."""

from deq_lm.regularizers.jacobian import jacobian_frobenius

__all__ = ["jacobian_frobenius"]
