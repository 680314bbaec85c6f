"""How a solve is differentiated; never how it is solved."""

from deq_lm.adjoints.base import Adjoint, DifferentiableMap, Solve
from deq_lm.adjoints.implicit import Implicit
from deq_lm.adjoints.jacobian_free import JacobianFree
from deq_lm.adjoints.phantom import Phantom
from deq_lm.adjoints.reversible import Reversed
from deq_lm.adjoints.unrolled import Unrolled

__all__ = ["Adjoint", "DifferentiableMap", "Implicit", "JacobianFree", "Phantom", "Reversed", "Solve", "Unrolled"]
