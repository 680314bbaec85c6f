"""A learned start: it begins as none, learns what it is to propose, saves evaluations, and changes nothing else."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from processes import launch
from tiny_model import VOCABULARY, make
from tiny_run import PLAIN, leave_weights_alone, make_recipe, make_state, metrics, one_step
from torch import Tensor, nn

from deq_lm import DEQLMConfig, DEQLMForCausalLM
from deq_lm.adjoints import Implicit
from deq_lm.equilibrium import Equilibrium
from deq_lm.errors import ConfigError, UnusedSettingWarning
from deq_lm.learned_start import LearnedStart
from deq_lm.modeling import build_config, count_parameters, matching_stack
from deq_lm.solvers import Picard, StoppingRule
from deq_lm.training.loop import train

TIGHT = StoppingRule(max_steps=200, rtol=1e-12)


class Affine(nn.Module):
    """f(z, x) = z A + x: the equilibrium is x (I - A)^-1, which a linear start can say exactly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.map = nn.Parameter(0.5 * torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0])

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return z @ self.map + x


def affine() -> tuple[Equilibrium, LearnedStart, Tensor]:
    start = LearnedStart(6).double()
    layer = Equilibrium(
        Affine(),
        solver=Picard(),
        stopping=TIGHT,
        adjoint=Implicit(solver=Picard(), stopping=TIGHT),
        learned_start=start,
    )
    return layer, start, torch.randn(4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def token_ids(length: int = 9, batch: int = 2) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(2))


def proposing(model: DEQLMForCausalLM) -> DEQLMForCausalLM:
    """With a start that is not 0."""
    nn.init.normal_(model.model.layers.learned_start.weight, std=0.3)
    nn.init.normal_(model.model.layers.learned_start.bias, std=0.3)
    return model


def test_where_the_equilibrium_is_linear_in_the_input_it_is_found_and_no_step_is_left_to_take():
    layer, start, x = affine()
    before = layer(x).solution.num_steps.max()
    optimizer = torch.optim.LBFGS(start.parameters(), max_iter=200, tolerance_grad=1e-14, tolerance_change=1e-18)

    def closure() -> Tensor:
        optimizer.zero_grad()
        error = layer(x).start_error
        error.backward()
        return error

    optimizer.step(closure)
    assert layer(x).start_error < 1e-12
    expected = torch.linalg.inv(torch.eye(6, dtype=torch.float64) - layer.cell.module.map.detach()).T
    torch.testing.assert_close(start.weight.detach(), expected, rtol=0, atol=1e-5)
    loose = layer(x, stopping=StoppingRule(max_steps=200, rtol=1e-5)).solution
    assert before > 20
    assert loose.num_steps.max() == 0


def test_its_error_is_the_squared_distance_to_the_equilibrium_relative_to_its_square_and_1_at_zero():
    layer, start, x = affine()
    segment = layer(x)
    assert segment.start_error == 1
    nn.init.normal_(start.bias)
    segment = layer(x)
    z = segment.solution.z
    expected = torch.stack([(start.bias - own).square().sum() / own.square().sum() for own in z]).mean()
    torch.testing.assert_close(segment.start_error, expected)


def test_where_the_equilibrium_is_zero_the_error_and_its_gradient_are_finite_and_pull_to_zero():
    start, x, z = LearnedStart(4), torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    z[0] = 0.0
    error = LearnedStart.error(start(x), z)
    error.backward()
    assert error == 0.5  # of the other sequence: 1
    assert start.weight.grad.isfinite().all()
    nn.init.ones_(start.bias)
    far = LearnedStart.error(start(x[:1]), z[:1])
    assert far == 12.0
    (pull,) = torch.autograd.grad(far, start.bias)
    assert torch.equal(pull, torch.full((4,), 6.0))


def test_nothing_but_the_start_learns_from_its_error_and_the_start_learns_from_nothing_else():
    layer, start, x = affine()
    x.requires_grad_()
    segment = layer(x)
    reached = torch.autograd.grad(segment.start_error, [x, layer.cell.module.map], allow_unused=True, retain_graph=True)
    assert reached == (None, None)
    assert all(gradient.any() for gradient in torch.autograd.grad(segment.start_error, list(start.parameters())))
    error = LearnedStart.error(start(x), z := x.detach().requires_grad_())
    assert torch.autograd.grad(error, z, allow_unused=True) == (None,)
    segment = layer(x)
    assert torch.autograd.grad(segment.output.sum(), list(start.parameters()), allow_unused=True) == (None, None)


def test_a_solve_begins_there_shallow_steps_and_a_given_start_do_not_and_without_gradients_there_is_no_error():
    layer, start, x = affine()
    nn.init.normal_(start.bias)
    once = StoppingRule.fixed(0)
    f = layer.cell.bind(x)
    zero = torch.zeros_like(x)
    torch.testing.assert_close(layer(x, stopping=once).output, f(zero + start.bias))
    torch.testing.assert_close(layer(x, num_unrolled_steps=1).output, f(zero))
    torch.testing.assert_close(layer(x, stopping=once, start=layer.cell.as_state(zero + 2)).output, f(zero + 2))
    assert layer(x, num_unrolled_steps=1).start_error is not None
    with torch.no_grad():
        assert layer(x).start_error is None


def test_a_model_begins_as_the_one_without_it_to_the_bit_and_has_the_same_equilibria_from_any_start():
    plain, learned = make(), make(start="linear")
    ids = token_ids()
    with torch.no_grad():
        found, early = (
            [
                plain(ids, **budget).logits,
                learned(ids, **budget).logits,
                proposing(make(start="linear"))(ids, **budget).logits,
            ]
            for budget in ({}, {"max_evaluations": 2})
        )
    for logits in (found, early):
        assert torch.equal(logits[0], logits[1])
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=1e-6)
    assert (early[2] - early[0]).abs().max() > 1e-2


def test_the_future_changes_no_bit_of_the_past_wherever_the_solve_stops():
    model = proposing(make(start="linear"))
    ids = token_ids(12)
    for budget in (1, 3, 40):
        with torch.no_grad():
            before = model(ids, max_evaluations=budget).logits
            for cut in (1, 5, 11):
                changed = ids.clone()
                changed[:, cut:] = (changed[:, cut:] + 1) % VOCABULARY
                assert torch.equal(before[:, :cut], model(changed, max_evaluations=budget).logits[:, :cut])


def test_at_padding_the_start_is_zero_so_that_left_padding_changes_nothing():
    model, ids = proposing(make(start="linear")), token_ids()
    padded = torch.cat([torch.zeros(2, 4, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(13) >= 4).long().expand(2, -1)
    with torch.no_grad():
        for budget in (1, 3):
            found, expected = (model(*tokens, max_evaluations=budget) for tokens in ((padded, mask), (ids,)))
            assert not found.solution.z[:, :4].any()
            assert found.solution.z[:, 4:].any()
            torch.testing.assert_close(found.logits[:, 4:], expected.logits, rtol=0, atol=1e-10)


def test_generation_with_a_cache_begins_there_too():
    model = proposing(make(start="linear"))
    ids = token_ids(5, batch=1)
    once = [model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*once)


def test_it_is_saved_loaded_and_drawn_like_the_rest(tmp_path: Path):
    model = proposing(make(start="linear", dtype=torch.float32))
    model.save_pretrained(tmp_path)
    loaded = DEQLMForCausalLM.from_pretrained(tmp_path)
    assert loaded.model.layers.learned_start.weight.equal(model.model.layers.learned_start.weight)
    with torch.device("meta"):
        bare = DEQLMForCausalLM(model.config)
    bare.to_empty(device="cpu")
    for parameter in bare.parameters():
        nn.init.constant_(parameter, float("nan"))
    bare.init_weights()
    assert all(parameter.isfinite().all() for parameter in bare.parameters())
    assert not bare.model.layers.learned_start.weight.any()


@pytest.mark.parametrize("phases", ["[]", "[{until: 1.0, num_unrolled_steps: 2}]"])
def test_a_training_step_gives_the_start_a_gradient_and_leaves_that_of_the_rest_alone(tmp_path: Path, phases: str):
    gradients = []
    for extra in ((), ("model.start=linear",)):
        faults = [f"training.faults.unconverged_{solve}.policy=ignore" for solve in ("solve", "adjoint")]
        settings = (*PLAIN, "training.jacobian=null", *faults, f"training.phases={phases}")
        recipe = make_recipe(tmp_path, *settings, *extra)
        state, *_ = make_state(recipe, accelerator := Accelerator(cpu=True))
        leave_weights_alone(state)
        one_step(recipe, state, accelerator)
        gradients.append({name: parameter.grad for name, parameter in state.model.named_parameters()})
    plain, learned = gradients
    own = {name for name in learned if "learned_start" in name}
    assert len(own) == 2
    assert all(learned[name].any() for name in own)
    assert plain.keys() == learned.keys() - own
    assert all(torch.equal(plain[name], learned[name]) for name in plain)


def run(folder: Path, overrides: tuple[str, ...]) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(1)
    train(make_recipe(folder, *overrides))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_two_processes_train_as_one_through_shallow_steps_and_solves(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    settings = ("model.start=linear", "model.cell.dropout=0.0", "training.jacobian=null", "training.max_steps=4")
    overrides = {name: (*settings, f"training.output_dir={tmp_path / name}") for name in ("one", "two")}
    make_recipe(tmp_path)
    run(tmp_path, overrides["one"])
    launch(run, tmp_path, overrides["two"])
    losses = [
        [line["loss"] for line in metrics(make_recipe(tmp_path, *overrides[name]), "train")] for name in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_it_is_counted_and_left_to_the_equilibrium_alone():
    cell = {"name": "transformer_xl", "d_model": 32, "num_heads": 2, "d_inner": 200}
    model = {"cell": cell, "start": "linear"}
    with_start, without = (count_parameters(build_config(m, 50)).other for m in (model, {"cell": cell}))
    assert with_start == without + 32 * 33
    assert "start" not in matching_stack(model, 1, 50)


def test_another_word_is_refused_and_a_model_without_solves_warns():
    with pytest.raises(ConfigError, match=r"model\.start: 'mlp'; expected 'linear', or null"):
        DEQLMConfig(start="mlp")
    with pytest.warns(UnusedSettingWarning, match=r"depth=unrolled.*model\.start"):
        DEQLMConfig(depth="unrolled", num_layers=2, start="linear")
