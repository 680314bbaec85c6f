"""Faults found in other implementations of deep equilibrium models, each with the tests that would notice it here.

Those tests that are in this file try the faulty design as well, in a few lines, and see the check reject it.

1. A limited memory that overwrites one rank-one term on which later ones were built.
    tests/solvers/test_peer_faults.py::test_a_limited_memory_whose_terms_build_on_each_other_is_never_overwritten
    tests/solvers/test_broyden.py::test_the_prefix_form_satisfies_all_secant_equations_kept
    tests/solvers/test_broyden.py::test_first_method_satisfies_the_newest_secant_equation
    tests/solvers/test_broyden.py::test_limited_memory_never_blows_up_on_a_map_it_cannot_solve
2. Keeping the best iterate by `mask * a + ~mask * b`, which is NaN where one is infinite; and a sequence that is NaN makes
   the whole batch run to its budget without a word.
    tests/solvers/test_peer_faults.py::test_an_infinite_iterate_is_replaced_by_the_best_one
    tests/solvers/test_peer_faults.py::test_a_sequence_that_is_nan_costs_the_others_no_evaluation_and_is_reported
    tests/solvers/test_contract.py::test_a_value_that_turns_nan_midway_leaves_a_finite_state_and_says_so
    tests/solvers/test_contract.py::test_sequences_that_fail_do_not_touch_the_others
3. A ridge or a tolerance with a unit: gradients of a small loss degenerate.
    tests/solvers/test_peer_faults.py::test_the_adjoint_equation_is_solved_as_well_for_a_loss_of_any_size
    tests/solvers/test_properties.py::test_scaling_by_a_power_of_two_scales_every_bit
    tests/solvers/test_contract.py::test_scaling_the_problem_scales_every_iterate
    tests/adjoints/test_contract.py::test_scaling_the_cotangent_scales_the_gradient
4. An implicit gradient that lives in a hook: gone in the second backward pass, entangled with the next forward pass, and
   an error where gradients are off.
    tests/solvers/test_peer_faults.py::test_every_backward_pass_gives_the_implicit_gradient
    tests/solvers/test_peer_faults.py::test_two_forward_passes_before_a_backward_pass_add_up
    tests/solvers/test_peer_faults.py::test_in_training_mode_it_runs_without_gradients
    tests/adjoints/test_contract.py::test_a_second_backward_gives_the_same_gradient_and_two_forwards_do_not_mix
    tests/adjoints/test_reversible.py::test_a_second_backward_is_the_same_or_refused_and_two_forwards_do_not_mix
5. A backward pass that evaluates the cell with the dropout mask, mode, random state or autocast state of that moment.
    tests/solvers/test_peer_faults.py::test_the_backward_pass_knows_nothing_of_what_happened_since_the_forward_pass
    tests/solvers/test_peer_faults.py::test_the_backward_pass_evaluates_in_the_precision_of_the_forward_pass
    tests/solvers/test_peer_faults.py::test_weights_written_to_between_the_passes_are_an_error
    tests/cells/test_contract.py::test_a_bound_cell_reads_the_inputs_it_is_given_and_nothing_else
    tests/modeling/test_model.py::test_dropout_is_one_mask_a_solve_so_that_the_solve_converges_and_backward_repeats
    tests/modeling/test_model.py::test_mixed_precision_trains_and_is_left_before_backward
    tests/adjoints/test_reversible.py::test_the_dropout_mask_is_one_for_both_directions
6. A norm over the whole batch.
    tests/solvers/test_peer_faults.py::test_every_sequence_is_solved_to_the_tolerance_and_as_it_is_alone
    tests/solvers/test_properties.py::test_permuting_the_batch_permutes_the_results
    tests/solvers/test_contract.py::test_a_sequence_alone_and_in_a_batch_give_the_same
7. Anderson's method that fails in half precision and in float64, or does not move within two steps.
    tests/solvers/test_peer_faults.py::test_one_or_two_steps_move_the_state_in_every_precision
    tests/solvers/test_contract.py::test_half_precision_and_strided_starts_are_solved_in_float32
    tests/solvers/test_map_contract.py::test_under_autocast_f_runs_in_half_precision_and_the_solver_does_not
8. A spectral radius by the Rayleigh quotient.
    tests/solvers/test_peer_faults.py::test_a_rotation_has_the_spectral_radius_of_its_scale
    tests/regularizers/test_jacobian.py::test_the_spectral_radius_of_rotations_and_of_non_normal_maps
9. An initialization that writes to a derived weight, and ties that come apart when a model is converted.
    tests/solvers/test_peer_faults.py::test_a_stated_spread_reaches_a_weight_that_is_normalized
    tests/solvers/test_peer_faults.py::test_tied_weights_stay_tied_when_the_model_is_converted
    tests/cells/test_transformer_xl.py::test_initial_weights_have_the_stated_spread_also_under_weight_norm
    tests/modeling/test_saving.py::test_a_checkpoint_round_trip_keeps_every_logit_and_the_tie
10. Dropout of whole tokens; queries computed for memory, and its keys and values in every evaluation.
    tests/solvers/test_peer_faults.py::test_dropout_takes_features_at_all_positions_and_no_token_whole
    tests/solvers/test_peer_faults.py::test_memory_is_projected_once_a_solve_and_has_no_queries
    tests/cells/test_transformer_xl.py::test_one_dropout_mask_a_solve_over_features_and_not_over_positions
    tests/cells/test_transformer_xl.py::test_what_does_not_depend_on_z_is_computed_once_per_solve
11. Steps undone in floating point: the error grows by 1 / (1 - relaxation) each.
    tests/solvers/test_peer_faults.py::test_undoing_steps_in_floating_point_does_not_lead_back
    tests/adjoints/test_reversible.py::test_backwards_it_visits_the_states_of_the_forward_solve_to_the_last_bit
    tests/adjoints/test_reversible.py::test_it_is_the_unrolled_gradient_wherever_each_unit_stopped
12. Misspelt options ignored; the caller's configuration written to.
    tests/solvers/test_peer_faults.py::test_a_misspelt_option_is_refused
    tests/solvers/test_peer_faults.py::test_what_the_caller_configures_with_is_not_written_to
    tests/modeling/test_model.py::test_a_wrong_setting_names_its_place_and_the_nearest_right_one
    tests/test_structure.py::test_an_unknown_key_is_refused_at_its_place_and_the_nearest_key_is_named
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from contractions import Contraction
from problems import causal_matrix, linear
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

from deq_lm import DEQLMConfig, DEQLMForCausalLM
from deq_lm.adjoints import Adjoint, Implicit, Phantom, Unrolled
from deq_lm.cells import BoundCell, Memory, TransformerXLCell, TransformerXLConfig
from deq_lm.equilibrium import Equilibrium
from deq_lm.regularizers import spectral_radius
from deq_lm.solvers import Anderson, Broyden, FixedPointSolver, Outcome, Picard, SolverState, StoppingRule, solve
from deq_lm.solvers.base import evaluate

ROOT = Path(__file__).parents[2]
SOLVERS = [solver(scope=scope) for solver in (Picard, Anderson, Broyden) for scope in ("prefix", "sequence")]
TIGHT = StoppingRule(max_steps=1000, rtol=1e-12, patience=100)

every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: f"{type(s).__name__}-{s.scope}")


def test_every_test_named_above_exists():
    assert __doc__ is not None
    faults = re.findall(r"^(\d+)\. .*\n(?:   \S.*\n)*((?:    tests/.*\n)+)", __doc__, flags=re.MULTILINE)
    assert [int(number) for number, _ in faults] == list(range(1, 13))
    named = [line.strip().split("::") for _, lines in faults for line in lines.splitlines()]
    assert len(named) == __doc__.count("::test_")
    for path, test in named:
        functions = {
            node.name for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.FunctionDef)
        }
        assert test in functions, f"{path}::{test}"


def contraction(*, norm: float = 0.8, batch: int = 2, length: int = 3, width: int = 4) -> Contraction:
    matrix = causal_matrix(length, width, seed=0)
    matrix = norm * matrix / torch.linalg.matrix_norm(matrix, 2)
    x = torch.randn(batch, length, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    blocks = matrix.view(length, width, length, width)
    return Contraction(blocks.requires_grad_(), x.requires_grad_(), norm, "tanh")


def like(tensor: Tensor, seed: int = 2) -> Tensor:
    return torch.randn(tensor.shape, dtype=tensor.dtype, generator=torch.Generator().manual_seed(seed))


def distance(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Relative, of all tensors together."""
    a, b = (torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (found, wanted))
    return (torch.dist(a, b) / b.norm()).item()


# 1. limited memory


@dataclass(frozen=True)
class Terms(SolverState):
    pairs: tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True, kw_only=True)
class Overwriting(FixedPointSolver):
    """Broyden's first method with H = -I + sum_j u_j v_j^T, of which the oldest term is overwritten when all are taken."""

    history_size: int
    scope: str = "sequence"

    def init(self, f, z0):
        return Terms(**vars(super().init(f, z0)), pairs=())

    def step(self, f, state, active):
        def product(z: Tensor, left: int) -> Tensor:
            terms = [pair[left] * (pair[1 - left] * z).sum() for pair in state.pairs]
            return sum(terms, -z)

        new = evaluate(f, state.point - product(state.residual, 0), state, active)
        step, change = new.point - state.point, new.residual - state.residual
        v = product(step, 1)
        u = (step - product(change, 0)) / (v * change).sum()
        return Terms(**vars(new), pairs=(*state.pairs, (u, v))[-self.history_size :])


def test_a_limited_memory_whose_terms_build_on_each_other_is_never_overwritten():
    problem = linear("linear", 0.9, batch=1, length=6, width=6)
    rule = StoppingRule(max_steps=150, rtol=1e-8, patience=None)

    def solves(solver: FixedPointSolver) -> bool:
        solution = solve(problem.f, problem.z0, solver=solver, stopping=rule, fallback=None)
        return bool(solution.converged.all())

    assert solves(Overwriting(history_size=150))  # with room for all terms it is Broyden's method
    assert not solves(Overwriting(history_size=8))
    assert solves(Broyden(history_size=8, scope="sequence"))
    assert solves(Broyden(history_size=8))


# 2. values that are not finite


@every_solver
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_infinite_iterate_is_replaced_by_the_best_one(solver: FixedPointSolver, value: float):
    problem = linear("linear", 0.9)
    calls = 0

    def f(z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        image = problem.f(z)
        if calls >= 4:
            image[0] = value
        return image

    rule = StoppingRule(max_steps=40, rtol=1e-8)
    solution = solve(f, problem.z0, solver=solver, stopping=rule, fallback=None)
    assert solution.outcome[0] == Outcome.NON_FINITE
    assert solution.z.isfinite().all()
    first = solve(problem.f, problem.z0, solver=solver, stopping=StoppingRule.fixed(2))
    if solver.scope == "sequence":
        assert torch.equal(solution.z[0], first.z[0])

    point, best, failed = torch.full((3,), value), torch.ones(3), torch.tensor(True)
    assert (failed * best + ~failed * point).isnan().all()


@every_solver
def test_a_sequence_that_is_nan_costs_the_others_no_evaluation_and_is_reported(solver: FixedPointSolver):
    problem = linear("linear", 0.5)
    calls = 0

    def f(z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        image = problem.f(z)
        image[1] = math.nan
        return image

    rule = StoppingRule(max_steps=500, rtol=1e-6)
    solution = solve(f, problem.z0, solver=solver, stopping=rule)
    assert solution.outcome.tolist() == [Outcome.CONVERGED, Outcome.NON_FINITE, Outcome.CONVERGED]
    going_on = int(solution.num_evaluations[[0, 2]].max())
    assert calls <= going_on + 1 < 100  # and one to put the broken sequence back

    z, num_steps = problem.z0, 0
    while num_steps < 500 and not (f(z) - z).norm() <= 1e-6 * f(z).norm():  # one norm for all
        z, num_steps = f(z), num_steps + 1
    assert num_steps == 500


# 3. scale


@dataclass(frozen=True, kw_only=True)
class AbsoluteRidge(FixedPointSolver):
    """Anderson's method over all states so far, with normal equations regularized by 1e-4 of no particular unit."""

    scope: str = "sequence"

    def init(self, f, z0):
        start = super().init(f, z0)
        return Terms(**vars(start), pairs=((start.point, start.image),))

    def step(self, f, state, active):
        points, images = (torch.stack(states[-6:]).flatten(1) for states in zip(*state.pairs, strict=True))
        residuals = images - points
        gram = residuals @ residuals.T
        weights = torch.linalg.solve(gram + 1e-4 * torch.eye(len(gram), dtype=gram.dtype), torch.ones_like(gram[0]))
        proposal = (weights / weights.sum()) @ images
        new = evaluate(f, proposal.view_as(state.point), state, active)
        return Terms(**vars(new), pairs=(*state.pairs, (new.point, new.image)))


@pytest.mark.parametrize("loss_scale", [1e3, 1.0, 1e-3, 1e-6, 1e-12])
@every_solver
def test_the_adjoint_equation_is_solved_as_well_for_a_loss_of_any_size(solver: FixedPointSolver, loss_scale: float):
    f = contraction(batch=1)
    matrix = f.blocks.detach().flatten(2).flatten(0, 1)
    cotangent = loss_scale * like(matrix[0])
    wanted = torch.linalg.solve(torch.eye(len(matrix), dtype=matrix.dtype) - matrix, cotangent)

    def error(solver: FixedPointSolver, stopping: StoppingRule) -> float:
        start = cotangent.view(f.x.shape)
        solution = solve(
            lambda u: (matrix @ u.flatten()).view_as(u) + start, 0 * start, solver=solver, stopping=stopping
        )
        return distance([solution.z], [wanted])

    steps = 60 if isinstance(solver, Picard) else 20
    assert error(solver, StoppingRule(max_steps=steps, rtol=1e-6)) < 1e-5
    if loss_scale <= 1e-3:
        assert error(solver, StoppingRule(max_steps=60, rtol=0.0, atol=1e-3 * len(cotangent) ** 0.5)) > 0.1


def test_the_check_above_rejects_an_absolute_ridge():
    matrix = causal_matrix(3, 4, seed=0)
    matrix = 0.95 * matrix / torch.linalg.eigvals(matrix).abs().max()
    cotangent = like(matrix[0])
    wanted = torch.linalg.solve(torch.eye(len(matrix), dtype=matrix.dtype) - matrix, cotangent)

    def error(solver: FixedPointSolver, scale: float) -> float:
        start = scale * cotangent.view(1, 3, 4)
        rule = StoppingRule.fixed(20)
        solution = solve(lambda u: (matrix @ u.flatten()).view_as(u) + start, 0 * start, solver=solver, stopping=rule)
        return distance([solution.z / scale], [wanted])

    assert error(AbsoluteRidge(), 1e-6) > 100 * error(AbsoluteRidge(), 1e3)
    for solver in (Anderson(), Anderson(scope="sequence")):
        assert error(solver, 1e-6) == pytest.approx(error(solver, 1e3), rel=1e-3)


# 4. hooks


def attach(adjoint: Adjoint, f: Contraction, solver: FixedPointSolver | None = None) -> Tensor:
    run = partial(solve, solver=Broyden() if solver is None else solver, stopping=TIGHT)
    return adjoint.apply(f, torch.zeros_like(f.x), run)[0]


def by_hook(f: Contraction) -> Tensor:
    """One recorded evaluation at z*, with the adjoint solve in a hook that takes itself away."""
    z = solve(f, torch.zeros_like(f.x), solver=Broyden(), stopping=TIGHT).z.requires_grad_()
    image = f(z)

    def adjoint_solve(cotangent: Tensor) -> Tensor:
        handle.remove()
        transposed = partial(torch.autograd.grad, image, z, retain_graph=True)
        return solve(lambda u: transposed(u)[0] + cotangent, cotangent, solver=Picard(), stopping=TIGHT).z

    handle = image.register_hook(adjoint_solve)
    return image


def test_every_backward_pass_gives_the_implicit_gradient():
    f = contraction()
    cotangent = like(f.x)
    wanted = torch.autograd.grad(attach(Unrolled(), f, Picard()), f.inputs, cotangent)

    def errors(output: Tensor) -> list[float]:
        return [distance(torch.autograd.grad(output, f.inputs, cotangent, retain_graph=True), wanted) for _ in range(3)]

    assert max(errors(attach(Implicit(stopping=TIGHT), f))) < 1e-8
    first, second, _ = errors(by_hook(f))
    assert first < 1e-8
    assert second > 0.1


def equilibrium(**options) -> Equilibrium:
    torch.manual_seed(0)
    sizes = {"d_model": 8, "num_heads": 2, "d_inner": 12, "mem_len": 3, "init_std": 0.3}
    cell = TransformerXLCell(TransformerXLConfig(**sizes, **options))
    with torch.no_grad():  # strong injection and weak feedback: a contraction
        for name, parameter in cell.named_parameters():
            parameter *= 4.0 if "inject" in name else 0.25 if "qkv" in name else 1.0
    return Equilibrium(cell, stopping=TIGHT, adjoint=Implicit(stopping=TIGHT)).double()


def inputs(seed: int) -> Tensor:
    return torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_two_forward_passes_before_a_backward_pass_add_up():
    layer = equilibrium()
    parameters = list(layer.parameters())

    def loss(seed: int) -> Tensor:
        return layer(inputs(seed)).output.square().cumsum(-1).sum()

    separately = [torch.autograd.grad(loss(seed), parameters) for seed in (1, 2)]
    first, second = loss(1), loss(2)
    together = torch.autograd.grad(first + second, parameters)
    assert distance(together, [a + b for a, b in zip(*separately, strict=True)]) < 1e-9


def test_in_training_mode_it_runs_without_gradients():
    layer = equilibrium().train()
    with torch.no_grad():
        without = layer(inputs(1)).output
    assert not without.requires_grad
    assert torch.equal(layer(inputs(1)).output, without)


# 5. what changes between the passes


@dataclass(frozen=True)
class Rebinding:
    """f that reads its module again whenever its graph is built."""

    cell: TransformerXLCell
    x: Tensor
    bound: BoundCell

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (self.x,)

    def with_inputs(self, inputs: Sequence[Tensor]) -> Rebinding:
        (x,) = inputs
        return Rebinding(self.cell, x, self.cell.bind(x))

    def __call__(self, z: Tensor) -> Tensor:
        return self.bound(z)


DISTURBANCES: dict[str, Callable[[TransformerXLCell], object]] = {
    "evaluation mode": lambda cell: cell.eval(),
    "random state": lambda cell: torch.manual_seed(7),
    "another forward pass": lambda cell: cell.bind(inputs(5).float()),
}


@pytest.mark.parametrize("disturbance", DISTURBANCES)
def test_the_backward_pass_knows_nothing_of_what_happened_since_the_forward_pass(disturbance: str):
    cell = equilibrium(dropout=0.4, weight_norm=True).cell.float()
    x = inputs(1).float().requires_grad_()
    run = partial(solve, solver=Broyden(), stopping=StoppingRule(max_steps=100, rtol=1e-6))

    def gradient(rebinding: bool, disturb: bool) -> list[Tensor]:
        torch.manual_seed(3)
        f = cell.train().bind(x)
        output, _ = Implicit().apply(Rebinding(cell, x, f) if rebinding else f, torch.zeros_like(x), run)
        torch.manual_seed(3)
        if disturb:
            DISTURBANCES[disturbance](cell)
        return list(torch.autograd.grad(output, x, torch.ones_like(output).cumsum(-1)))

    wanted = gradient(rebinding=False, disturb=False)
    assert distance(gradient(rebinding=False, disturb=True), wanted) == 0.0
    assert distance(gradient(rebinding=True, disturb=False), wanted) < 1e-6  # right as long as nothing happens
    assert distance(gradient(rebinding=True, disturb=True), wanted) > 0.1


def test_the_backward_pass_evaluates_in_the_precision_of_the_forward_pass():
    cell, x, z = equilibrium().cell.float(), inputs(1).float(), inputs(2).float()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            f = cell.bind(x)
            forward = f(z)
        assert torch.equal(f.with_inputs(f.inputs)(z), forward)
        assert distance([Rebinding(cell, x, f).with_inputs([x])(z)], [forward]) > 1e-4


def test_weights_written_to_between_the_passes_are_an_error():
    f = contraction()
    output = attach(Implicit(stopping=TIGHT), f)
    with torch.no_grad():
        f.blocks.mul_(1.01)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


# 6. norms over the batch


@every_solver
def test_every_sequence_is_solved_to_the_tolerance_and_as_it_is_alone(solver: FixedPointSolver):
    rate = torch.tensor([0.1, 0.9], dtype=torch.float64)[:, None, None]
    x = torch.tensor([100.0, 1.0], dtype=torch.float64)[:, None, None] * inputs(1).abs()
    rtol = 1e-3
    found = {}

    def by_solver(f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
        return solve(f, z, solver=solver, stopping=StoppingRule(max_steps=300, rtol=rtol)).z

    def by_one_norm(f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
        while (f(z) - z).norm() > rtol * f(z).norm():
            z = f(z)
        return z

    for name, run in {"each": by_solver, "all": by_one_norm}.items():
        z = run(lambda z: rate * z + x, 0 * x)
        residual = rate * z + x - z
        alone = run(lambda z: rate[1:] * z + x[1:], 0 * x[1:])
        found[name] = (
            (residual.flatten(1).norm(dim=1) / (z + residual).flatten(1).norm(dim=1)).max() <= rtol,
            distance([z[1:]], [alone]) < 1e-12,
        )
    assert found == {"each": (True, True), "all": (False, False)}


# 7. precision and small budgets


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("max_steps", [1, 2, 3])
@every_solver
def test_one_or_two_steps_move_the_state_in_every_precision(
    solver: FixedPointSolver, max_steps: int, dtype: torch.dtype
):
    x = inputs(1).to(dtype)

    def f(z: Tensor) -> Tensor:
        return (0.6 * z.to(dtype) + 0.1 * z.to(dtype).sin() + x).to(dtype)

    z0 = torch.zeros_like(x)
    solution = solve(f, z0, solver=solver, stopping=StoppingRule(max_steps=max_steps, rtol=0.0))
    assert solution.num_steps.tolist() == [max_steps] * 2
    assert solution.z.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (solution.relative_residual < 0.9 * solution.trace.relative_residual[0]).all()

    best, lowest, newest = z0, math.inf, f(z0)
    for _ in range(2, max_steps):  # begins with two states, and judges only those it makes from them
        newest = f(newest)
        if (residual := (f(newest) - newest).norm().item()) < lowest:
            best, lowest = newest, residual
    assert torch.equal(best, z0) == (max_steps <= 2)


# 8. spectral radius


def test_a_rotation_has_the_spectral_radius_of_its_scale():
    turn = 0.9 * torch.tensor([[math.cos(1.4), -math.sin(1.4)], [math.sin(1.4), math.cos(1.4)]], dtype=torch.float64)
    z = torch.randn(1, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert spectral_radius(lambda z: z @ turn.T, z).item() == pytest.approx(0.9)
    vector = z.flatten() / z.norm()
    for _ in range(100):
        product = turn @ vector
        quotient, vector = vector @ product, product / product.norm()
    assert quotient.item() < 0.2


# 9. initialization and ties


def test_a_stated_spread_reaches_a_weight_that_is_normalized():
    torch.manual_seed(0)
    cell = TransformerXLCell(TransformerXLConfig(d_model=64, d_inner=64, weight_norm=True, init_std=0.01))
    derived = parametrizations.weight_norm(nn.Linear(64, 64))
    with torch.no_grad():
        nn.init.normal_(derived.weight, std=0.01)  # writes to a tensor that is computed anew at the next reading
    assert cell.qkv.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert derived.weight.std().item() > 0.05


def test_tied_weights_stay_tied_when_the_model_is_converted():
    cell = {"name": "transformer_xl", "d_model": 8, "num_heads": 2, "d_inner": 8}
    model = DEQLMForCausalLM(DEQLMConfig(vocab_size=11, cell=cell))

    def are_tied(a: nn.Module, b: nn.Module) -> bool:
        with torch.no_grad():
            a.weight.mul_(2.0)
        return torch.equal(a.weight, b.weight)

    for convert in (
        nn.Module.double,
        nn.Module.bfloat16,
        nn.Module.float,
        copy.deepcopy,
        partial(nn.Module.to_empty, device="cpu"),
    ):
        model = convert(model)
        with torch.no_grad():
            model.lm_head.weight.normal_()
        assert are_tied(model.model.embed_tokens, model.lm_head), convert

    pair = nn.ModuleList([nn.Embedding(11, 8), nn.Linear(8, 11)])
    pair[1].weight = nn.Parameter(pair[0].weight.data)
    assert are_tied(*pair)
    assert not are_tied(*pair.double())


# 10. dropout and memory of the cell


def test_dropout_takes_features_at_all_positions_and_no_token_whole():
    x = torch.ones(4, 6, 64, dtype=torch.float64)
    torch.manual_seed(0)
    cell = TransformerXLCell(TransformerXLConfig(d_model=64, d_inner=64, dropout=0.5)).double().train()

    def takes_features(mask: Tensor) -> bool:
        dropped = x * mask == 0
        return bool(torch.equal(dropped.all(dim=1), dropped.any(dim=1)) and not dropped.all(dim=2).any())

    tensors = cell.bind(x).tensors
    masks = [tensors[name] for name in ("attention_dropout", "output_dropout")]
    assert all(map(takes_features, masks))
    assert not torch.equal(*masks)
    assert not takes_features(torch.bernoulli(torch.full((4, 6, 1), 0.5)))


def test_memory_is_projected_once_a_solve_and_has_no_queries():
    batch, length, past, width = 2, 5, 3, 8
    cell = equilibrium().cell
    x, memory = inputs(1), Memory(inputs(2)[:, :past], inputs(3)[:, :past])

    def products(call: Callable[[], object]) -> int:
        """Multiplications by weights."""
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            call()
        counts = counter.get_flop_counts()["Global"]
        return sum(count for kind, count in counts.items() if kind in (torch.ops.aten.mm, torch.ops.aten.addmm)) // 2

    without = products(lambda: cell.bind(x))
    of_a_distance = width**2
    keys_and_values = batch * past * width * 2 * width
    # From states and inputs; queries, too, would be half as much again.
    assert products(lambda: cell.bind(x, memory)) == without + past * of_a_distance + 2 * keys_and_values
    z = inputs(4)
    alone, remembering = cell.bind(x), cell.bind(x, memory)
    assert products(lambda: remembering(z)) == products(lambda: alone(z)) >= batch * length * width * 4 * width


# 11. steps undone


@pytest.mark.parametrize(("dtype", "num_pairs", "at_least"), [(torch.float32, 16, 1e-3), (torch.float64, 48, 1e-3)])
def test_undoing_steps_in_floating_point_does_not_lead_back(dtype: torch.dtype, num_pairs: int, at_least: float):
    """Which is what the reversible solver has its lattice for: there the states are the same to the last bit."""
    f = contraction()
    f = f.with_inputs([tensor.detach().to(dtype) for tensor in f.inputs])
    y = z = start = like(f.x)
    for _ in range(num_pairs):
        y = 0.5 * y + 0.5 * f(z)
        z = 0.5 * z + 0.5 * f(y)
    for _ in range(num_pairs):
        z = 2 * z - f(y)
        y = 2 * y - f(z)
    assert distance([z], [start]) > at_least


# 12. options


@pytest.mark.parametrize("component", [Picard, Anderson, Broyden, StoppingRule, Implicit, Phantom, TransformerXLConfig])
def test_a_misspelt_option_is_refused(component: type):
    name = dataclasses.fields(component)[0].name
    misspelt = name[1] + name[0] + name[2:]
    with pytest.raises(TypeError, match=misspelt):
        component(**{misspelt: 1})
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(component(), name, 1)


def test_what_the_caller_configures_with_is_not_written_to():
    settings = {
        "cell": {"name": "transformer_xl", "d_model": 8, "num_heads": 2, "d_inner": 8},
        "solver": {"name": "anderson"},
        "stopping": {"max_steps": 5},
        "adjoint": {"name": "implicit", "solver": {"name": "picard"}},
    }
    before = copy.deepcopy(settings)
    config = DEQLMConfig(vocab_size=11, **settings)
    DEQLMForCausalLM(config)
    assert settings == before
    stated = copy.deepcopy(config.to_dict())
    settings["adjoint"]["solver"]["name"] = "broyden"
    settings["stopping"]["max_steps"] = 6
    assert config.to_dict() == stated
