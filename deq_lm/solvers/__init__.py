"""Find z with f(z) = z. Knows nothing of gradients, cells or text."""

from deq_lm.solvers.anderson import Anderson
from deq_lm.solvers.base import FixedPointSolver, SolverState
from deq_lm.solvers.broyden import Broyden
from deq_lm.solvers.operator_splitting import ForwardBackward, PeacemanRachford
from deq_lm.solvers.picard import Picard
from deq_lm.solvers.proximal_form import ProximalForm, proximal_form
from deq_lm.solvers.reversible import Reversible
from deq_lm.solvers.solution import ResidualTrace, Solution
from deq_lm.solvers.solve import solve
from deq_lm.solvers.stopping import Outcome, StoppingRule

__all__ = [
    "Anderson",
    "Broyden",
    "FixedPointSolver",
    "ForwardBackward",
    "Outcome",
    "PeacemanRachford",
    "Picard",
    "ProximalForm",
    "ResidualTrace",
    "Reversible",
    "Solution",
    "SolverState",
    "StoppingRule",
    "proximal_form",
    "solve",
]
