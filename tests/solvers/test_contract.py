"""What every solver must do, under both scopes."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from dense_form import DenseForm, counted, monotone, monotone_matrix, problem_for, scaled, spoiled
from problems import Problem, all_problems, linear, rotation, solution_at_zero, tanh

from deq_lm.solvers import (
    Anderson,
    Broyden,
    FixedPointSolver,
    ForwardBackward,
    Outcome,
    PeacemanRachford,
    Picard,
    Reversible,
    StoppingRule,
    solve,
)

SOLVERS = [
    solver(scope=scope, **options)
    for scope in ("prefix", "sequence")
    for solver, options in [
        (Picard, {}),
        (Picard, {"relaxation": 0.7}),
        (Reversible, {}),
        (Reversible, {"relaxation": 0.5}),
        (Anderson, {}),
        (Anderson, {"relaxation": 0.8, "history_size": 3}),
        (Broyden, {}),
        (Broyden, {"history_size": 16}),
        (Broyden, {"history_size": 4}),
        (Broyden, {"history_size": 1}),
        (ForwardBackward, {}),
        (PeacemanRachford, {}),
        (PeacemanRachford, {"step_size": 2.5}),
    ]
]
TIGHT = StoppingRule(max_steps=3000, rtol=1e-13, patience=400)
ON_THE_LATTICE = replace(TIGHT, rtol=1e-12)  # as fine as a reversible solve resolves


def describe(value: object) -> str:
    return str(value).replace(" ", "")


every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=describe)
of_values_alone = pytest.mark.parametrize(
    "solver", [solver for solver in SOLVERS if not solver.needs_proximal_form], ids=describe
)


@pytest.mark.parametrize("problem", [*all_problems(), monotone()], ids=repr)
@every_solver
def test_finds_the_known_fixed_point(solver: FixedPointSolver, problem: Problem):
    if solver.needs_proximal_form and problem.name != "monotone":
        pytest.skip("this map does not come apart")
    small_memory = getattr(solver, "history_size", 9) < 4
    if isinstance(solver, Broyden) and solver.scope == "sequence":
        small_memory = solver.history_size < 16  # it starts over when full, and these have 20 dimensions
        if (solver.history_size, problem.name) == (4, "linear 0.9"):
            pytest.skip("Picard solves this map, and starting over every fourth step solves two of its three sequences")
    if not problem.is_contraction and (isinstance(solver, (Picard, Reversible)) or small_memory):
        pytest.skip("this map needs a quasi-Newton method with more than a few pairs")
    rule = ON_THE_LATTICE if isinstance(solver, Reversible) else TIGHT
    solution = solve(problem.f, problem.z0, solver=solver, stopping=rule)
    assert solution.outcome.tolist() == [Outcome.CONVERGED] * len(problem.z0)
    torch.testing.assert_close(solution.z, problem.z_star, rtol=0, atol=1e-8)


@every_solver
def test_reports_the_residual_of_the_state_it_returns(solver: FixedPointSolver):
    problem = problem_for(solver, linear("linear", 0.9))
    for max_steps in (0, 1, 2, 7):
        solution = solve(problem.f, problem.z0, solver=solver, stopping=StoppingRule(max_steps=max_steps))
        image = problem.f(solution.z)
        torch.testing.assert_close(solution.image, image, rtol=1e-12, atol=1e-13)
        norm = (image - solution.z).flatten(1).norm(dim=1)
        torch.testing.assert_close(solution.residual_norm, norm, rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(solution.relative_residual, norm / image.flatten(1).norm(dim=1), rtol=1e-9, atol=0)


@every_solver
def test_counts_every_evaluation_and_step(solver: FixedPointSolver):
    problem = problem_for(solver, tanh())
    calls: list[int] = []
    rule = StoppingRule(max_steps=200, rtol=1e-6)
    solution = solve(counted(problem.f, calls), problem.z0, solver=solver, stopping=rule)
    assert solution.num_steps.max() > 5
    assert len(calls) == solution.num_evaluations.max() == solution.num_steps.max() + 1
    assert len(solution.trace.residual_norm) == len(calls)


@every_solver
def test_no_step_still_evaluates_once(solver: FixedPointSolver):
    problem = problem_for(solver, tanh())
    solution = solve(problem.f, problem.z0, solver=solver, stopping=StoppingRule(max_steps=0))
    assert torch.equal(solution.z, problem.z0)
    assert torch.equal(solution.image, problem.f(problem.z0))
    assert solution.num_evaluations.tolist() == [1, 1, 1]
    assert solution.outcome.tolist() == [Outcome.MAX_STEPS] * 3


@every_solver
def test_a_sequence_alone_and_in_a_batch_give_the_same(solver: FixedPointSolver):
    problem = problem_for(solver, linear("linear", 0.9))
    rule = StoppingRule(max_steps=25, rtol=1e-6)
    together = solve(problem.f, problem.z0, solver=solver, stopping=rule)
    first = replace(problem.f, offset=problem.f.offset[:1]) if isinstance(problem.f, DenseForm) else problem.f
    alone = solve(first, problem.z0[:1], solver=solver, stopping=rule)
    torch.testing.assert_close(together.z[:1], alone.z, rtol=0, atol=1e-12)
    for fact in ("num_steps", "num_evaluations", "outcome", "position_num_steps"):
        assert torch.equal(getattr(together, fact)[:1], getattr(alone, fact)), fact


@every_solver
def test_an_already_solved_entry_costs_one_evaluation_and_does_not_move(solver: FixedPointSolver):
    problem = problem_for(solver, tanh())
    z0 = problem.z0.clone()
    z0[1] = problem.z_star[1]
    rule = ON_THE_LATTICE if isinstance(solver, Reversible) else TIGHT
    solution = solve(problem.f, z0, solver=solver, stopping=rule)
    assert solution.num_evaluations[1] == 1
    assert torch.equal(solution.z[1], problem.z_star[1])
    torch.testing.assert_close(solution.z, problem.z_star, rtol=0, atol=1e-8)


@every_solver
def test_a_solution_at_zero_needs_an_absolute_tolerance_and_is_then_found(solver: FixedPointSolver):
    problem = solution_at_zero()
    if solver.needs_proximal_form:
        matrix = monotone_matrix(length=4, width=3, seed=0)
        problem = replace(problem, f=DenseForm(matrix, -torch.ones_like(problem.z_star)))
    rule = StoppingRule(max_steps=400, rtol=1e-6, atol=1e-10)
    solution = solve(problem.f, problem.z0 + 0.9, solver=solver, stopping=rule)
    assert solution.converged.all()
    torch.testing.assert_close(solution.z, problem.z_star, rtol=0, atol=1e-8)


@every_solver
def test_scaling_the_problem_scales_every_iterate(solver: FixedPointSolver):
    problem = problem_for(solver, linear("linear", 0.9))
    for steps in (3, 12):
        plain = solve(problem.f, problem.z0, solver=solver, stopping=StoppingRule(max_steps=steps))
        for scale in (1e-8, 1e8):
            rule = StoppingRule(max_steps=steps)
            larger = solve(scaled(problem.f, scale), problem.z0, solver=solver, stopping=rule)
            torch.testing.assert_close(larger.z / scale, plain.z, rtol=1e-5, atol=1e-7)
            assert torch.equal(larger.num_steps, plain.num_steps)


@every_solver
def test_sequences_that_fail_do_not_touch_the_others(solver: FixedPointSolver):
    problem = monotone(batch=8) if solver.needs_proximal_form else linear("linear", 0.5, batch=8)
    rule = StoppingRule(max_steps=60, rtol=1e-9)
    failing = {
        1: (lambda _z, image: torch.full_like(image, float("nan")), {Outcome.NON_FINITE}),
        3: (lambda z, _image: 5.0 + z**2 + 9.0 * z.abs(), {Outcome.DIVERGED, Outcome.NON_FINITE, Outcome.STALLED}),
        6: (lambda z, _image: z + 1, {Outcome.DIVERGED, Outcome.STALLED}),  # residuals never differ: singular systems
    }
    if solver.needs_proximal_form:  # a map that comes apart has a solution, and does not explode
        failing = {1: failing[1]}

    def f(z: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        return torch.stack([failing[i][0](z[i], one) if i in failing else one for i, one in enumerate(image)])

    with_failures = (
        spoiled(problem.f, lambda image: f(image, image))
        if solver.needs_proximal_form
        else lambda z: f(z, problem.f(z))
    )
    undisturbed = solve(problem.f, problem.z0, solver=solver, stopping=rule)
    solution = solve(with_failures, problem.z0, solver=solver, stopping=rule, fallback=None)
    others = [i for i in range(8) if i not in failing]
    for fact in ("z", "image", "num_steps", "num_evaluations", "outcome"):
        assert torch.equal(getattr(solution, fact)[others], getattr(undisturbed, fact)[others]), fact
    for i, (_, outcomes) in failing.items():
        assert solution.outcome[i].item() in outcomes, i
    assert solution.z.isfinite().all()


@every_solver
def test_a_value_that_turns_nan_midway_leaves_a_finite_state_and_says_so(solver: FixedPointSolver):
    problem = problem_for(solver, linear("linear", 0.9))
    calls = 0

    def spoil_the_fourth(image: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            image = image.clone()
            image[0, -1, 0] = float("nan")
        return image

    rule = StoppingRule(max_steps=40, rtol=1e-8)
    f = spoiled(problem.f, spoil_the_fourth)
    solution = solve(f, problem.z0, solver=solver, stopping=rule, fallback=None)
    assert solution.outcome[0] == Outcome.NON_FINITE
    assert not solution.used_fallback.any()
    assert solution.z.isfinite().all()
    torch.testing.assert_close(solution.image[0], problem.f(solution.z)[0], rtol=1e-12, atol=1e-13)


@of_values_alone
def test_a_map_without_fixed_point_is_never_called_converged(solver: FixedPointSolver):
    maps: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "translation": lambda z: z + 5.1,
        "growth": lambda z: 1.05 * z.abs() + 1.0,
        "a residual stream that nothing normalizes": lambda z: z + 2 + torch.nn.functional.layer_norm(z, (4,)).tanh(),
        "overflow": lambda z: z + 1.0 + z.square(),
        "overflow of an exponential": lambda z: z.exp() + z.abs(),
    }
    for dtype in (torch.float32, torch.float64):
        for name, f in maps.items():
            z0 = torch.zeros(2, 3, 4, dtype=dtype)
            solution = solve(f, z0, solver=solver, stopping=StoppingRule(max_steps=3000, rtol=1e-4))
            assert not solution.converged.any(), name
            assert solution.z.isfinite().all(), name


@of_values_alone
def test_degenerate_maps_give_a_finite_answer_and_the_right_outcome(solver: FixedPointSolver):
    z0 = torch.full((2, 3, 4), 2.0, dtype=torch.float64)
    constant = solve(lambda z: torch.ones_like(z), z0, solver=solver, stopping=TIGHT)
    assert constant.converged.all()
    torch.testing.assert_close(constant.z, torch.ones_like(z0))
    identity = solve(lambda z: z.clone(), z0, solver=solver, stopping=TIGHT)
    assert identity.num_evaluations.tolist() == [1, 1]
    assert identity.converged.all()
    # Plain steps are one and the same, back and forth; Reversible's pairs no less, nor what starts over at every step.
    swap = solve(lambda z: 1 - z, z0, solver=solver, stopping=StoppingRule(max_steps=60))
    circling = [Picard(scope=solver.scope), Reversible(scope=solver.scope), Broyden(history_size=1, scope="sequence")]
    assert swap.outcome.tolist() == [Outcome.STALLED if solver in circling else Outcome.CONVERGED] * 2
    assert swap.z.isfinite().all()
    for scale in (1e-38, 1e38):
        solution = solve(
            lambda z, s=scale: 0.5 * z + s,
            torch.zeros(1, 2, 3),
            solver=solver,
            stopping=StoppingRule(max_steps=60),
        )
        assert solution.z.isfinite().all()
        assert solution.converged.all() == (torch.dist(solution.z, torch.full((1, 2, 3), 2 * scale)) < 0.1 * scale)


@every_solver
def test_nothing_is_recorded_for_backpropagation(solver: FixedPointSolver):
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    z0 = torch.ones(2, 3, 4, dtype=torch.float64, requires_grad=True)
    form = DenseForm(weight * torch.eye(12, dtype=torch.float64), torch.ones_like(z0))
    solution = solve(form if solver.needs_proximal_form else lambda z: weight * z + 1, z0, solver=solver)
    assert not solution.z.requires_grad
    assert not solution.image.requires_grad


@every_solver
def test_half_precision_and_strided_starts_are_solved_in_float32(solver: FixedPointSolver):
    z0 = torch.zeros(4, 3, 2, dtype=torch.bfloat16).transpose(1, 2)
    form = DenseForm(0.5 * torch.eye(6), torch.ones(4, 2, 3))
    f = form if solver.needs_proximal_form else lambda z: 0.5 * z + 1
    solution = solve(f, z0, solver=solver, stopping=StoppingRule(max_steps=60))
    assert solution.z.dtype == torch.float32
    torch.testing.assert_close(solution.z, torch.full_like(solution.z, 2.0), rtol=1e-2, atol=0)


@every_solver
def test_results_do_not_depend_on_how_often_the_device_is_asked(solver: FixedPointSolver):
    problem = problem_for(solver, linear("linear", 0.9))
    every = solve(problem.f, problem.z0, solver=solver, stopping=StoppingRule(max_steps=50, rtol=1e-5))
    seldom = solve(problem.f, problem.z0, solver=solver, stopping=StoppingRule(max_steps=50, rtol=1e-5, check_every=7))
    assert torch.equal(every.z, seldom.z)
    for fact in ("num_steps", "num_evaluations", "outcome"):
        assert torch.equal(getattr(every, fact), getattr(seldom, fact)), fact


@pytest.mark.parametrize("solver", [solver for solver in SOLVERS if solver.scope == "prefix"], ids=describe)
@pytest.mark.parametrize("rtol", [0.0, 1e-1, 1e-3, 1e-6])
@pytest.mark.parametrize("max_steps", [1, 2, 5, 12, 30])
def test_changing_the_future_leaves_the_past_bit_identical(solver: FixedPointSolver, max_steps: int, rtol: float):
    generator = torch.Generator().manual_seed(0)
    for cut in (1, 3, 5):
        first = torch.randn(2, 6, 4, dtype=torch.float64, generator=generator)
        second = first.clone()
        second[:, cut:] = 3 * torch.randn(2, 6 - cut, 4, dtype=torch.float64, generator=generator)
        solutions = []
        for x in (first, second):

            def f(z: torch.Tensor, x: torch.Tensor = x) -> torch.Tensor:
                return (1.2 * z + 0.4 * z.cumsum(1) / 6 + x).tanh()  # causal position by position, bit for bit

            form = DenseForm(monotone_matrix(length=6, width=4, seed=0), x)
            rule = StoppingRule(max_steps=max_steps, rtol=rtol)
            map_ = form if solver.needs_proximal_form else f
            solutions.append(solve(map_, torch.zeros_like(x), solver=solver, stopping=rule))
        for fact in ("z", "image", "position_num_steps"):
            before = [getattr(solution, fact)[:, :cut] for solution in solutions]
            assert torch.equal(*before), fact


@pytest.mark.parametrize("solver", [Anderson(scope="sequence"), Broyden(scope="sequence")], ids=describe)
def test_the_sequence_scope_does_leak_so_that_the_test_above_can_fail(solver: FixedPointSolver):
    first = torch.linspace(-1, 1, 24, dtype=torch.float64).view(1, 6, 4)
    second = first.clone()
    second[:, 3:] += 1
    outputs = [
        solve(
            lambda z, x=x: (0.9 * z.cumsum(1) / 2 + x).tanh(),
            0 * x,
            solver=solver,
            stopping=StoppingRule.fixed(4),
        ).z[:, :3]
        for x in (first, second)
    ]
    assert not torch.equal(*outputs)


@pytest.mark.parametrize(
    "solver", [Picard(), Reversible(), Anderson(), Broyden(), Broyden(scope="sequence")], ids=describe
)
def test_of_several_fixed_points_a_prefix_finds_the_same_whatever_follows(solver: FixedPointSolver):
    """No tolerance helps where there are several: with sums over whole sequences two converged solves differ by up to 2."""
    generator = torch.Generator().manual_seed(0)
    first, second = (0.5 * torch.randn(60, 6, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    second[:, :3] = first[:, :3]
    rule = StoppingRule(max_steps=400, rtol=1e-10, patience=100)
    solutions = [
        solve(lambda z, x=x: (2.0 * z + 0.4 * z.cumsum(1) / 6 + x).tanh(), 0 * x, solver=solver, stopping=rule)
        for x in (first, second)
    ]
    converged = solutions[0].converged & solutions[1].converged
    distance = (solutions[0].z - solutions[1].z)[:, :3].abs().amax(dim=(1, 2))
    assert converged.sum() > 40
    if solver.scope == "prefix":
        assert (distance == 0).all()
    else:
        assert (distance[converged] > 1.0).any()


ACCELERATED = [Anderson(), Anderson(scope="sequence"), Broyden(), Broyden(scope="sequence")]


@pytest.mark.parametrize("solver", ACCELERATED, ids=describe)
def test_a_half_precision_history_still_finds_the_solution_to_full_precision(solver: FixedPointSolver):
    problem = tanh()
    solver = replace(solver, half_precision_history=True)  # type: ignore[type-var]
    solution = solve(problem.f, problem.z0, solver=solver, stopping=TIGHT)
    assert solution.converged.all()
    assert solution.z.dtype == torch.float64
    torch.testing.assert_close(solution.z, problem.z_star, rtol=0, atol=1e-8)


def test_a_prefix_converges_when_its_whole_residual_is_small_whatever_follows():
    """The tolerance is of the prefix: a small position may converge above its own, because one before it is large."""
    x = torch.tensor([[[100.0], [1.0], [1.0]]], dtype=torch.float64)
    rate = torch.tensor([[[0.1], [0.9], [0.9]]], dtype=torch.float64)
    solution = solve(lambda z: rate * z + x, 0 * x, solver=Picard(), stopping=StoppingRule(max_steps=500, rtol=1e-3))
    norms = (solution.image - solution.z).square().cumsum(1).sqrt(), solution.image.square().cumsum(1).sqrt()
    assert (norms[0] <= 1e-3 * norms[1]).all()
    assert (solution.image - solution.z).abs()[0, 1, 0] > 1e-3 * solution.image[0, 1, 0]
    assert solution.position_num_steps.diff(dim=1).ge(0).all()


def test_picard_cannot_solve_the_rotation_and_says_so():
    problem = rotation()
    solution = solve(problem.f, problem.z0, solver=Picard(), stopping=StoppingRule(max_steps=400, patience=None))
    assert solution.outcome.tolist() == [Outcome.DIVERGED] * 2


def test_a_slow_solve_that_is_cut_short_says_max_steps_and_one_that_goes_nowhere_says_stalled():
    problem = linear("slow", 0.99)
    cut = solve(problem.f, problem.z0, solver=Picard(), stopping=StoppingRule(max_steps=10))
    assert cut.outcome.tolist() == [Outcome.MAX_STEPS] * 3
    flat = solve(lambda z: z + 1, problem.z0, solver=Picard(), stopping=StoppingRule(max_steps=100, patience=6))
    assert flat.outcome.tolist() == [Outcome.STALLED] * 3
    assert flat.num_steps.tolist() == [6] * 3


def test_only_picard_can_be_differentiated_through():
    with pytest.raises(ValueError, match="cannot be backpropagated through"):
        solve(torch.tanh, torch.zeros(1, 2, 3), solver=Broyden(), differentiable=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Picard(relaxation=0.0), r"Picard\(relaxation=0.0\): expected a value in \(0, 1\]"),
        (
            lambda: Reversible(relaxation=1.0),
            r"Reversible\(relaxation=1.0\): expected a value strictly between 0 and 1",
        ),
        (
            lambda: Reversible(relaxation=0.0),
            r"Reversible\(relaxation=0.0\): expected a value strictly between 0 and 1",
        ),
        (lambda: Reversible(scope="suffix"), r"Reversible\(scope='suffix'\): expected 'prefix'"),  # type: ignore[arg-type]
        (lambda: Anderson(history_size=0), r"Anderson\(history_size=0\): expected 1 or more"),
        (lambda: Anderson(relaxation=1.5), r"Anderson\(relaxation=1.5\)"),
        (lambda: Broyden(history_size=0), r"Broyden\(history_size=0\): expected 1 or more"),
        (lambda: Broyden(restart_growth=0.0), r"Broyden\(restart_growth=0.0\): expected a value above 0"),
        (lambda: Broyden(max_step=0.0), r"Broyden\(max_step=0.0\): expected a value above 0"),
        (lambda: Anderson(restart_growth=-1.0), r"Anderson\(restart_growth=-1.0\): expected a value above 0"),
        (lambda: Broyden(scope="suffix"), r"Broyden\(scope='suffix'\): expected 'prefix'"),  # type: ignore[arg-type]
        (lambda: ForwardBackward(step_size=0.0), r"ForwardBackward\(step_size=0.0\): expected a value above 0"),
        (lambda: PeacemanRachford(scope="suffix"), r"PeacemanRachford\(scope='suffix'\): expected 'prefix'"),  # type: ignore[arg-type]
        (lambda: StoppingRule(max_steps=-1), r"max_steps=-1"),
        (lambda: StoppingRule(rtol=float("nan")), r"rtol=nan"),
        (lambda: StoppingRule(atol=-1.0), r"atol=-1.0"),
        (lambda: StoppingRule(patience=0), r"patience=0"),
        (lambda: StoppingRule(divergence_factor=0.5), r"divergence_factor=0.5"),
        (lambda: StoppingRule(check_every=0), r"check_every=0"),
        (lambda: solve(torch.tanh, torch.zeros(3), solver=Picard()), r"shape \(3,\)"),
        (lambda: solve(torch.tanh, torch.full((1, 2, 3), float("nan")), solver=Picard()), "NaN or infinite"),
    ],
)
def test_illegal_arguments_are_refused_with_what_is_allowed(make, message):
    with pytest.raises(ValueError, match=message):
        make()
