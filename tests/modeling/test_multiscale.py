"""A language model of the multiscale cell: what the model promises holds for it unchanged."""

from __future__ import annotations

import pytest
import torch
from tiny_model import TIGHT, VOCABULARY, make
from torch import Tensor
from transformers import AutoModelForCausalLM

from deq_lm import DEQLMForCausalLM
from deq_lm.solvers import Outcome, StoppingRule

CELL = {
    "name": "multiscale",
    "coarse": [{"ratio": 2, "d_model": 8, "num_heads": 2, "d_inner": 12}, {"ratio": 2, "d_model": 4, "num_heads": 1}],
}


def model_of(**settings) -> DEQLMForCausalLM:
    return make(cell={**CELL, "mem_len": 12, **settings.pop("cell", {})}, **settings)


@pytest.mark.parametrize(
    "solver", [{"name": "broyden"}, {"name": "anderson"}, {"name": "picard"}, {"name": "reversible"}], ids=str
)
@pytest.mark.parametrize("stopping", [{"max_steps": 3, "rtol": 0.0}, {"max_steps": 40, "rtol": 1e-2}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_rate_depends_on_later_tokens_in_any_bit(ids: Tensor, solver: dict, stopping: dict, dtype: torch.dtype):
    model = model_of(dtype=dtype, solver=solver, stopping=stopping)
    with torch.no_grad():
        memory = model(ids[:, :5].flip(1)).memory  # which ends within a chunk of every rate
        for cut in (1, 2, 4, 7):
            changed = ids.clone()
            changed[:, cut:] = (changed[:, cut:] + 7) % VOCABULARY
            before, after = (model(tokens, memory=memory) for tokens in (ids, changed))
            assert before.solution.z.shape[2] == 16 + 8 + 4
            for name in ("z", "image", "position_num_steps"):
                found, wanted = (getattr(output.solution, name)[:, :cut] for output in (before, after))
                assert torch.equal(found, wanted), name
            assert not torch.equal(before.last_hidden_state[:, cut:], after.last_hidden_state[:, cut:])


@pytest.mark.parametrize("cut", [1, 6, 7])
def test_two_segments_with_memory_equal_one_long_segment(ids: Tensor, cut: int):
    model = model_of()
    with torch.no_grad():
        whole, first = model(ids), model(ids[:, :cut])
        second = model(ids[:, cut:], memory=first.memory)
    assert whole.solution.outcome.tolist() == [Outcome.CONVERGED] * 3
    found = torch.cat([first.last_hidden_state, second.last_hidden_state], 1)
    torch.testing.assert_close(found, whole.last_hidden_state, rtol=0, atol=1e-9)


@pytest.mark.parametrize("stopping", [StoppingRule.fixed(4), StoppingRule(rtol=1e-2)], ids=["fixed", "tolerance"])
@pytest.mark.parametrize("num_pads", [3, 4])
def test_left_padding_changes_nothing_however_far_the_solve_got(ids: Tensor, stopping: StoppingRule, num_pads: int):
    model = model_of()
    pads = torch.zeros(len(ids), num_pads, dtype=torch.long)
    padded = torch.cat([pads, ids], dim=1)
    mask = torch.cat([pads, torch.ones_like(ids)], dim=1)
    with torch.no_grad():
        found, expected = model(padded, attention_mask=mask, stopping=stopping), model(ids, stopping=stopping)
    torch.testing.assert_close(found.last_hidden_state[:, num_pads:], expected.last_hidden_state, rtol=0, atol=1e-10)
    assert torch.equal(found.solution.num_evaluations, expected.solution.num_evaluations)
    assert not found.last_hidden_state[:, :num_pads].any()


@pytest.mark.parametrize("blocks", [1, 2])
def test_the_implicit_gradient_is_that_of_every_solver(ids: Tensor, blocks: int):
    gradients = []
    for adjoint in ({"name": "unrolled"}, {"name": "implicit", "stopping": TIGHT}):
        model = model_of(cell={"num_blocks": blocks}, solver={"name": "picard"}, adjoint=adjoint)
        with torch.no_grad():
            memory = model(ids[:, :7].flip(1)).memory
        output = model(ids[:, :-1], targets=ids[:, 1:], memory=memory)
        output.loss.backward()
        assert output.solution.converged.all()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, wanted in gradients[0].items():
        assert wanted.norm() > 0, name
        assert torch.dist(gradients[1][name], wanted) <= 1e-6 * wanted.norm(), name


def test_it_survives_a_round_trip_and_trains_in_mixed_precision_with_regularization(ids: Tensor, tmp_path):
    model_of(dtype=torch.float32).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, stopping={"max_steps": 30, "rtol": 2e-2})
    assert model.config.cell["coarse"] == [{**CELL["coarse"][0]}, {**CELL["coarse"][1], "d_inner": 128}]
    with torch.autocast("cpu", torch.bfloat16):
        output = model(ids[:, :-1], targets=ids[:, 1:], estimate_jacobian=True)
    (output.loss + output.jacobian).backward()
    assert output.solution.converged.all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
