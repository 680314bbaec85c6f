"""A language model of the monotone cell, solved by operator splitting: what the model promises holds for it unchanged."""

from __future__ import annotations

import pytest
import torch
from tiny_model import TIGHT, VOCABULARY
from torch import Tensor
from transformers import AutoModelForCausalLM

from deq_lm import DEQLMConfig, DEQLMForCausalLM
from deq_lm.errors import ConfigError
from deq_lm.solvers import Outcome, StoppingRule

CELL = {"name": "monotone", "d_model": 16, "num_heads": 2, "num_taps": 3, "mem_len": 6, "init_std": 0.3}
SPLITTINGS = ["peaceman_rachford", "forward_backward"]


def make(solver: str = "peaceman_rachford", *, dtype: torch.dtype = torch.float64, **settings) -> DEQLMForCausalLM:
    torch.manual_seed(0)
    rule = {**TIGHT, "max_steps": 3000, "patience": None}
    adjoint = {"name": "implicit", "solver": {"name": "peaceman_rachford"}, "stopping": rule}
    settings = {"stopping": rule, "adjoint": adjoint, **settings}
    config = DEQLMConfig(vocab_size=VOCABULARY, cell=CELL, solver={"name": solver}, **settings)
    return DEQLMForCausalLM(config).to(dtype).eval()


@pytest.mark.parametrize("solver", [*SPLITTINGS, "broyden", "anderson"])
@pytest.mark.parametrize("stopping", [{"max_steps": 3, "rtol": 0.0}, {"max_steps": 40, "rtol": 1e-2}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hidden_states_do_not_depend_on_later_tokens_in_any_bit(
    ids: Tensor, solver: str, stopping: dict, dtype: torch.dtype
):
    model = make(solver, dtype=dtype, stopping=stopping)
    with torch.no_grad():
        memory = model(ids[:, :5].flip(1)).memory
        for cut in (1, 6, 11):
            changed = ids.clone()
            changed[:, cut:] = (changed[:, cut:] + 7) % VOCABULARY
            before, after = (model(tokens, memory=memory).last_hidden_state for tokens in (ids, changed))
            assert torch.equal(before[:, :cut], after[:, :cut])
            assert not torch.equal(before[:, cut:], after[:, cut:])


@pytest.mark.parametrize("solver", SPLITTINGS)
def test_two_segments_with_memory_equal_one_long_segment(ids: Tensor, solver: str):
    model = make(solver)
    with torch.no_grad():
        whole, first = model(ids), model(ids[:, :6])
        second = model(ids[:, 6:], memory=first.memory)
    assert whole.solution.outcome.tolist() == [Outcome.CONVERGED] * 3
    found = torch.cat([first.last_hidden_state, second.last_hidden_state], 1)
    torch.testing.assert_close(found, whole.last_hidden_state, rtol=0, atol=1e-9)
    assert (second.last_hidden_state - model(ids[:, 6:]).last_hidden_state).abs().max() > 1e-3  # memory matters


@pytest.mark.parametrize("solver", SPLITTINGS)
@pytest.mark.parametrize("stopping", [StoppingRule.fixed(4), StoppingRule(rtol=1e-2)], ids=["fixed", "tolerance"])
def test_left_padding_changes_nothing_however_far_the_solve_got(ids: Tensor, solver: str, stopping: StoppingRule):
    model = make(solver)
    pads = torch.zeros(len(ids), 4, dtype=torch.long)
    padded = torch.cat([pads, ids], dim=1)
    mask = torch.cat([pads, torch.ones_like(ids)], dim=1)
    with torch.no_grad():
        found, expected = model(padded, attention_mask=mask, stopping=stopping), model(ids, stopping=stopping)
    torch.testing.assert_close(found.last_hidden_state[:, 4:], expected.last_hidden_state, rtol=0, atol=1e-10)
    assert torch.equal(found.solution.num_evaluations, expected.solution.num_evaluations)
    assert not found.last_hidden_state[:, :4].any()


def test_all_solvers_give_one_equilibrium_and_one_gradient(ids: Tensor):
    results = []
    for solver in [*SPLITTINGS, "broyden", "anderson"]:
        model = make(solver)
        output = model(ids[:, :-1], targets=ids[:, 1:])
        output.loss.backward()
        assert output.solution.converged.all()
        assert model.adjoint_solution.converged.all()
        results.append([output.last_hidden_state, *(parameter.grad for parameter in model.parameters())])
    for other in results[1:]:
        for found, wanted in zip(other, results[0], strict=True):
            assert torch.dist(found, wanted) <= 1e-6 * wanted.norm()
            assert wanted.norm() > 0


def test_it_survives_a_round_trip_and_trains_in_mixed_precision(ids: Tensor, tmp_path):
    make(dtype=torch.float32).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, stopping={"max_steps": 60, "rtol": 1e-3})
    assert model.config.solver == {"name": "peaceman_rachford", "step_size": None, "scope": "prefix"}
    with torch.autocast("cpu", torch.bfloat16):
        output = model(ids[:, :-1], targets=ids[:, 1:])
    output.loss.backward()
    assert output.solution.converged.all()  # f is computed in float32: bfloat16 would not reach this tolerance
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("settings", "place"),
    [
        ({"solver": {"name": "forward_backward"}}, r"model\.solver: ForwardBackward with the cell TransformerXLConfig"),
        (
            {"adjoint": {"name": "implicit", "solver": {"name": "peaceman_rachford"}}},
            r"model\.adjoint\.solver: Peaceman",
        ),
        (
            {"cell": {**CELL, "num_blocks": 2}, "solver": {"name": "peaceman_rachford"}},
            r"MonotoneConfig of num_blocks=2",
        ),
    ],
)
def test_a_splitting_without_a_cell_that_comes_apart_is_refused_with_the_configuration(settings: dict, place: str):
    with pytest.raises(ConfigError, match=rf"{place}.*Take model.cell.name=monotone, or a solver"):
        DEQLMConfig(**settings)
