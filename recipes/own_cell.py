# %% [markdown]
# # An equilibrium of a cell of one's own
#
# Any torch module f(z, x) is a layer of unbounded depth: `Equilibrium` solves z = f(z, x) and differentiates the solution
# by the implicit function theorem, in the memory of one evaluation. Run this with `python recipes/own_cell.py`, or cell
# by cell in an editor.
#
# The task: which of two intertwined spirals does a point of the plane lie on? The cell is one layer of 32 units.

# %%
import math

import torch
import torch.nn.functional as F
from torch import nn

from deq_lm.adjoints import Implicit
from deq_lm.equilibrium import Equilibrium
from deq_lm.solvers import Broyden, StoppingRule

torch.manual_seed(0)


# %%
def spirals(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points of the plane, (number, 2), and which spiral each is on, (number,), 0 or 1."""
    turn, label = 1.5 * math.pi * torch.rand(number).sqrt(), torch.randint(2, (number,))
    angle = turn + math.pi * label
    points = turn[:, None] / 5 * torch.stack([angle.cos(), angle.sin()], dim=1)
    return points + 0.02 * torch.randn(number, 2), label


# %% [markdown]
# The cell is a module like any other. It starts as a contraction, so that there is one equilibrium to solve for.


# %%
class Unit(nn.Module):
    """f(z, x) = tanh(W z + x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.feedback = nn.Linear(width, width)
        nn.init.orthogonal_(self.feedback.weight, gain=0.5)

    def forward(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.feedback(z) + x)


class Classifier(nn.Module):
    """Points to the logit of the second spiral: embed, solve, read out."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(2, width)
        self.equilibrium = Equilibrium(
            Unit(width), solver=Broyden(), adjoint=Implicit(), stopping=StoppingRule(max_steps=16, rtol=1e-2)
        )
        self.read = nn.Linear(width, 1)

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        self.solved = self.equilibrium(self.embed(points))
        return self.read(self.solved.output).squeeze(1)


# %%
model = Classifier()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for step in range(51):
    points, labels = spirals(256)
    loss = F.binary_cross_entropy_with_logits(model(points), labels.float())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 0:
        evaluations = model.solved.solution.num_evaluations.float().mean()
        print(f"step {step}: loss {loss.item():.3f} nats, {evaluations:.1f} evaluations a point")

# %% [markdown]
# On points it has not seen. Each is solved on its own: some need more evaluations than others.

# %%
points, labels = spirals(2000)
with torch.no_grad():
    accuracy = ((model(points) > 0) == labels.bool()).float().mean().item()
solution = model.solved.solution
print(
    f"accuracy {accuracy:.3f}, {solution.converged.float().mean():.1%} of the solves converged, within "
    f"{solution.num_evaluations.min()} to {solution.num_evaluations.max()} evaluations"
)
