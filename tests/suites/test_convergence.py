"""Solves of a trained model measured again by hand: residuals, losses, two starts, the Jacobian."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import yaml

from deq_lm.data.streams import ContiguousStreams
from deq_lm.solvers import Broyden, StoppingRule
from deq_lm.structure import build
from deq_lm.suites import Subject
from deq_lm.suites.config import ConvergenceSettings
from deq_lm.suites.convergence import ConvergenceResult, measure_convergence
from deq_lm.training import Recipe, train
from deq_lm.training.run_folder import RunFolder

CPU = torch.device("cpu")
SETTINGS = ConvergenceSettings(num_evaluations=(1, 4, 60), num_segments=2)


@pytest.fixture(scope="module")
def result(subjects) -> ConvergenceResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        return measure_convergence("tiny", subjects[0], SETTINGS, CPU)


def segments_of(subject, num_segments: int) -> list[torch.Tensor]:
    """(B, L + 1) tokens: the first segments of the test split's streams."""
    config = subject.recipe.evaluation
    streams = ContiguousStreams(
        subject.corpus().splits["test"].tokens,
        num_streams=config.batch_size,
        segment_length=config.segment_length,
        rank=0,
        num_ranks=1,
        drop_remainder=True,
    )
    segments = [streams.next_segment() for _ in range(num_segments)]
    return [torch.cat([segment.input_ids, segment.targets[:, -1:]], dim=1) for segment in segments]


def assert_each_budget_is_that_of_the_model_stopped_there(subject, result) -> None:
    model = subject.trained(CPU)
    first, second = segments_of(subject, 2)
    for point in result.budgets[: len(SETTINGS.num_evaluations)]:
        assert point.solver == "Broyden (prefix)"
        stopping = StoppingRule.fixed(point.num_evaluations - 1)
        with torch.no_grad():
            memory = model(first[:, :-1]).memory
            outputs = (
                model(first[:, :-1], targets=first[:, 1:], stopping=stopping),
                model(second[:, :-1], targets=second[:, 1:], memory=memory, stopping=stopping),
            )
        nats = sum(output.nll_nats.item() for output in outputs) / (2 * first[:, 1:].numel())
        assert point.nats_per_token == pytest.approx(nats, rel=1e-6)
        residuals = torch.cat([output.solution.relative_residual for output in outputs])
        assert point.max_residual == pytest.approx(residuals.max().item(), rel=1e-4, abs=1e-7)


def test_each_budget_is_that_of_the_model_stopped_there(subjects, result):
    assert_each_budget_is_that_of_the_model_stopped_there(subjects[0], result)


def test_a_model_that_learns_its_start_is_measured_from_there(recipes, tmp_path):
    mapping = yaml.safe_load(recipes["equilibrium"].read_text("utf-8"))
    mapping["model"]["start"] = "linear"
    mapping["training"]["output_dir"] = str(tmp_path / "run")
    recipe = build(Recipe, mapping)
    assert train(recipe) is None
    subject = Subject("learned_start", recipe, RunFolder(tmp_path / "run"))
    assert subject.trained(CPU).model.layers.learned_start.weight.abs().max() > 0
    settings = replace(SETTINGS, solvers=(), checkpoints=False)
    result = measure_convergence("tiny", subject, settings, CPU)
    assert_each_budget_is_that_of_the_model_stopped_there(subject, result)


def test_every_solver_comes_to_the_same_loss_and_residuals_fall(result):
    by_solver: dict[str, list] = {}
    for point in result.budgets:
        by_solver.setdefault(point.solver, []).append(point)
    assert list(by_solver) == ["Broyden (prefix)", "Anderson (prefix)", "Picard"]
    for points in by_solver.values():
        residuals = [point.median_residual for point in points]
        assert residuals[0] > residuals[1] > residuals[2]
        assert points[-1].nats_per_token == pytest.approx(result.budgets[2].nats_per_token, abs=1e-4)


def test_positions_are_those_of_the_segment_and_their_residuals_fall(result, subjects):
    rows = result.position_residuals
    assert (len(rows), {len(row) for row in rows}) == (3, {subjects[0].recipe.evaluation.segment_length})
    assert max(rows[-1]) < 1e-4 < min(rows[0])


def test_two_starts_end_in_one_equilibrium(result):
    assert result.two_starts.max_distance < 1e-4
    assert result.two_starts.nats_per_token == pytest.approx(result.two_starts.other_nats_per_token, abs=1e-4)


def test_the_jacobian_is_measured_at_every_checkpoint_and_at_the_end(subjects, result):
    assert [point.step for point in result.contraction] == [6, 8]  # two are kept, and the last is the final model
    model = subjects[0].trained(CPU)
    first, second = (segment[:, :-1] for segment in segments_of(subjects[0], 2))
    with torch.no_grad():
        memory = model(first).memory
        x = model.model.embed_tokens(second) * model.config.d_model**0.5
        solution = model(second, memory=memory).solution
        f = model.model.layers.cell.bind(x, memory)
    radii = []
    for b in range(len(second)):

        def of_one(z, b=b):
            whole = solution.z.clone()
            whole[b] = z
            return f(whole)[b]

        jacobian = torch.autograd.functional.jacobian(of_one, solution.z[b])
        size = solution.z[b].numel()
        radii.append(torch.linalg.eigvals(jacobian.reshape(size, size)).abs().max().item())
    assert result.contraction[-1].max_spectral_radius == pytest.approx(max(radii), rel=0.05)
    norms = result.contraction[-1].jacobian_norm
    assert 0 < norms < 2


def test_a_cell_without_guarantees_has_none(result):
    assert result.guarantees == ()


def test_what_is_proved_of_a_monotone_cell_bounds_what_was_measured(recipes, tmp_path):
    mapping = yaml.safe_load(recipes["equilibrium"].read_text("utf-8"))
    mapping["model"]["cell"] = {"name": "monotone", "d_model": 16, "num_heads": 2, "mem_len": 8, "margin": 0.3}
    mapping["model"]["evaluation_stopping"] = {"max_steps": 60, "rtol": 1e-4}
    mapping["training"]["output_dir"] = str(tmp_path / "run")
    recipe = build(Recipe, mapping)
    assert train(recipe) is None
    subject = Subject("monotone", recipe, RunFolder(tmp_path / "run"))
    settings = replace(SETTINGS, solvers=(), checkpoints=False)
    result = measure_convergence("tiny", subject, settings, CPU)
    found = result.guarantees
    assert 0 < result.gradients[0].relative_error < 0.2
    assert [guarantee.splitting for guarantee in found] == ["ForwardBackward", "PeacemanRachford"]
    for guarantee in found:
        assert 0.3 == guarantee.margin <= guarantee.measured_margin <= guarantee.lipschitz
        assert 0 < guarantee.most_steps <= guarantee.certified_steps
        assert 0 < guarantee.largest_share <= 1
        assert guarantee.rtol == 1e-4
    assert found[1].certified_steps < found[0].certified_steps


def test_without_checkpoints_only_the_final_model_is_measured(subjects):
    settings = replace(SETTINGS, num_evaluations=(1,), solvers=(), checkpoints=False)
    result = measure_convergence("tiny", subjects[0], settings, CPU)
    assert [point.step for point in result.contraction] == [8]
    assert [point.solver for point in result.budgets] == ["Broyden (prefix)"]
    assert isinstance(subjects[0].trained(CPU).model.layers.solver, Broyden)
