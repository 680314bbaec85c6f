"""Sharded, or with a copy of the model in every process: the same run, however long each process's solves take."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from processes import ShardingAccelerator, launch
from safetensors.torch import load_file
from tiny_run import leave_weights_alone, make_recipe, make_state, metrics
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from deq_lm import DEQLMConfig, DEQLMForCausalLM
from deq_lm.errors import ConfigError
from deq_lm.training import loop, sharding
from deq_lm.training.loop import train
from deq_lm.training.step import train_step

# What forks here starts no threads before it computes on its own.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

KINDS = {"one": Accelerator, "ddp": Accelerator, "fsdp2": ShardingAccelerator}
NO_DROPOUT = ("training.jacobian=null", "model.cell.dropout=0.0")
OVERRIDES = {
    "full": "model.embedding={name: full}",
    "adaptive": "model.embedding={name: adaptive, cutoffs: [50, 150], div_val: 2}",
    "multiscale": "model.cell={name: multiscale, d_model: 16, num_heads: 2, d_inner: 32, mem_len: 8, init_std: 0.1, "
    "coarse: [{ratio: 4, d_model: 8, num_heads: 2, d_inner: 16}]}",
}


def gradient(folder: Path, kind: str, override: str) -> None:
    """Save the gradient of the second of two steps, of which the second process solves far more exactly."""
    AcceleratorState._reset_state(reset_partial_state=True)  # a forked process inherits the parent's
    torch.set_num_threads(1)
    accelerator = KINDS[kind]()
    rtol = (1e-8, 1e-13)[accelerator.process_index]
    stopping = f"{{max_steps: 200, rtol: {rtol:.1e}, patience: null}}"
    recipe = make_recipe(
        folder,
        *NO_DROPOUT,
        "model.cell.init_std=0.2",  # so that solves converge
        override,
        "training.clip_norm=null",
        "training.phases=[]",
        f"model.stopping={stopping}",
        f"model.adjoint={{name: implicit, stopping: {stopping}}}",
    )
    state, *_ = make_state(recipe, accelerator)
    state.model.double()
    model, state.optimizer = sharding.prepare(accelerator, state.model, state.optimizer)
    assert sharding.is_sharded(model) == (kind == "fsdp2")
    leave_weights_alone(state)
    train_step(accelerator, model, state, recipe, stop_requested=False)
    model.zero_grad()
    result = train_step(accelerator, model, state, recipe, stop_requested=False)
    grads = {name: sharding.whole(parameter.grad) for name, parameter in state.model.named_parameters()}
    interval = state.interval
    facts = {
        "norm": result.grad_norm,
        "nats": interval.nll_nats,
        "evaluations": (max(interval.solver_evaluations), max(interval.adjoint_evaluations)),
        "held": sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in state.model.parameters()),
    }
    torch.save((grads, facts), folder / f"{kind}_{accelerator.process_index}.pt")


@pytest.mark.parametrize("override", OVERRIDES.values(), ids=OVERRIDES)
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_of_unequal_numbers_of_evaluations_have_the_gradient_of_one(tmp_path, kind, override):
    make_recipe(tmp_path)  # the corpus, before two processes look for it
    launch(gradient, tmp_path, "one", override, num_processes=1)
    launch(gradient, tmp_path, kind, override)
    grads, facts = torch.load(tmp_path / "one_0.pt")
    both = [torch.load(tmp_path / f"{kind}_{rank}.pt") for rank in (0, 1)]
    forward, adjoint = ([other["evaluations"][i] for _, other in both] for i in (0, 1))
    assert forward[1] > forward[0] + 3
    assert adjoint[1] > adjoint[0] + 3
    held = [other["held"] for _, other in both]
    assert sum(held) == facts["held"] * (1 if kind == "fsdp2" else 2)
    assert max(held) < 0.6 * facts["held"] or kind == "ddp"
    for others, other in both:
        assert other["norm"] == pytest.approx(facts["norm"], rel=1e-6)
        assert other["nats"] == pytest.approx(facts["nats"], rel=1e-8)
        assert others.keys() == grads.keys()
        for name, value in grads.items():
            torch.testing.assert_close(others[name], value, rtol=0, atol=1e-6 * value.abs().max().item(), msg=name)


def run(folder: Path, kind: str, overrides: tuple[str, ...], resume: bool) -> None:
    """`train` in float64, so that what differs is not rounding."""
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        prepare = sharding.prepare

        def prepare_and_look(*arguments):
            wrapped, optimizer = prepare(*arguments)
            assert sharding.is_sharded(wrapped) == (kind == "fsdp2")
            return wrapped, optimizer

        patch.setattr(sharding, "prepare", prepare_and_look)
        patch.setattr(loop, "Accelerator", KINDS[kind])
        train(make_recipe(folder, *overrides), resume=resume)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Four steps by one process; by two, sharded; and so again, stopped and resumed after two, in folders of their own."""
    folder = tmp_path_factory.mktemp("runs")
    make_recipe(folder)
    settings = (*NO_DROPOUT, "training.phases=[]", "training.evaluate_every=2", "training.max_steps=4")
    overrides = {
        name: (*settings, f"training.output_dir={folder / name}") for name in ("one", "sharded", "resumed", "moved")
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.delenv("MASTER_PORT", raising=False)
        launch(run, folder, "one", overrides["one"], False, num_processes=1)
        launch(run, folder, "fsdp2", overrides["sharded"], False)
        launch(run, folder, "fsdp2", (*overrides["resumed"], "training.max_steps=2"), False)
        launch(run, folder, "fsdp2", overrides["resumed"], True)
        launch(run, folder, "fsdp2", (*overrides["moved"], "training.max_steps=2"), False)
        launch(run, folder, "one", overrides["moved"], True, num_processes=1)
    return {name: make_recipe(folder, *settings) for name, settings in overrides.items()}


def last_checkpoint(recipe) -> Path:
    return Path(recipe.training.output_dir) / "checkpoints" / "step_00000004"


@pytest.mark.parametrize("name", ["sharded", "resumed", "moved"])
def test_a_sharded_run_has_the_weights_the_optimizer_and_the_metrics_of_one_process(runs, name):
    one, other = runs["one"], runs[name]
    weights, others = (load_file(last_checkpoint(recipe) / "model.safetensors") for recipe in (one, other))
    assert weights.keys() == others.keys()
    for key, value in weights.items():
        torch.testing.assert_close(others[key], value, rtol=0, atol=1e-6 * value.abs().max().item(), msg=key)
    states, other_states = (torch.load(last_checkpoint(recipe) / "optimizer.pt") for recipe in (one, other))
    assert states["param_groups"] == other_states["param_groups"]
    assert states["state"].keys() == other_states["state"].keys()
    for i, state in states["state"].items():
        assert state["step"] == other_states["state"][i]["step"]
        for moment in ("exp_avg", "exp_avg_sq"):
            value, found = state[moment], other_states["state"][i][moment]
            torch.testing.assert_close(found, value, rtol=0, atol=1e-6 * value.abs().max().item())
    for kind, key in (
        ("train", "loss"),
        ("train", "grad_norm"),
        ("train", "solver_evaluations"),
        ("valid", "nats_per_token"),
        ("test", "nats_per_token"),
    ):
        values, found = ([line[key] for line in metrics(recipe, kind)] for recipe in (one, other))
        assert len(values) > 0
        assert found[-len(values) :] == pytest.approx(values, rel=1e-6)  # a resumed run has tested twice


def test_a_sharded_run_resumed_is_the_uninterrupted_one_bit_for_bit(runs):
    files = ("model.safetensors", "optimizer.pt", "rank_00000.safetensors", "rank_00001.safetensors")
    for name in files:
        first, second = (last_checkpoint(runs[run]) / name for run in ("sharded", "resumed"))
        assert first.read_bytes() == second.read_bytes(), name


def test_gathering_a_model_draws_none_of_the_random_numbers_of_the_run(runs):
    one, sharded = (load_file(last_checkpoint(runs[name]) / "rank_00000.safetensors") for name in ("one", "sharded"))
    assert one["random.torch"].equal(sharded["random.torch"])


def test_what_a_sharded_run_leaves_is_an_ordinary_model(runs):
    folder = Path(runs["sharded"].training.output_dir) / "final"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    weights = load_file(last_checkpoint(runs["sharded"]) / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert parameter.equal(weights[name])
    record = json.loads((folder / "evaluation.json").read_text())
    assert record["causality"]["max_change_nats"] == 0.0


def mixed_precision(folder: Path, kind: str) -> None:
    """Save what a step under bfloat16 gives, and the type of its gradient."""
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(1)
    accelerator = KINDS[kind](mixed_precision="bf16")
    recipe = make_recipe(folder, *NO_DROPOUT, "training.clip_norm=null", "training.phases=[]")
    state, *_ = make_state(recipe, accelerator)
    model, state.optimizer = sharding.prepare(accelerator, state.model, state.optimizer)
    leave_weights_alone(state)
    result = train_step(accelerator, model, state, recipe, stop_requested=False)
    dtypes = {parameter.grad.dtype for parameter in state.model.parameters()}
    with torch.no_grad():
        ids = torch.arange(8)[None]
        mixed, exact = (m(ids).last_hidden_state for m in (model, sharding.whole_model(state.model)))
    facts = (state.interval.nll_nats, result.grad_norm, dtypes, (mixed - exact).abs().max().item())
    torch.save(facts, folder / f"{kind}_{accelerator.process_index}.pt")


def test_bfloat16_rounds_products_and_neither_loss_nor_gradient(tmp_path):
    make_recipe(tmp_path)
    launch(mixed_precision, tmp_path, "ddp")
    launch(mixed_precision, tmp_path, "fsdp2")
    nats, norm, dtypes, _ = torch.load(tmp_path / "ddp_0.pt", weights_only=True)
    for rank in (0, 1):
        other_nats, other_norm, other_dtypes, difference = torch.load(tmp_path / f"fsdp2_{rank}.pt")
        assert other_nats == pytest.approx(nats, rel=1e-6)
        assert other_norm == pytest.approx(norm, rel=1e-4)
        assert other_dtypes == dtypes == {torch.float32}
        assert difference > 1e-4


def shard_the_cell(folder: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(1)
    accelerator = ShardingAccelerator()
    accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = ["TransformerXLCell"]
    state, *_ = make_state(make_recipe(folder), accelerator)
    with pytest.raises(ConfigError, match=r"inside model\.layers.*no fsdp_transformer_layer_cls_to_wrap"):
        sharding.prepare(accelerator, state.model, state.optimizer)
    assert isinstance(state.model.model.layers.cell, FSDPModule)
    assert isinstance(next(state.model.parameters()), DTensor)


def test_a_unit_inside_the_solve_where_unequal_processes_would_wait_for_ever_is_refused(tmp_path):
    make_recipe(tmp_path)
    launch(shard_the_cell, tmp_path)


@pytest.mark.parametrize("depth", ["equilibrium", "stack"])
def test_the_unit_the_model_names_is_one_it_has(depth):
    settings = {} if depth == "equilibrium" else {"depth": "stack", "num_layers": 2}
    model = DEQLMForCausalLM(DEQLMConfig(vocab_size=20, **settings))
    assert set(model._no_split_modules) == {type(model.model.layers).__name__}


SUPPORTED = {"fsdp_version": 2, "reshard_after_forward": False, "cpu_ram_efficient_loading": False}


def accelerator_with(**settings) -> SimpleNamespace:
    plugin = FullyShardedDataParallelPlugin(**settings)
    return SimpleNamespace(distributed_type=DistributedType.FSDP, state=SimpleNamespace(fsdp_plugin=plugin))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"fsdp_version": 1, "reshard_after_forward": None}, "fsdp_version=1: expected 2"),
        ({"reshard_after_forward": True}, "reshard_after_forward=True: expected False"),
        ({"cpu_ram_efficient_loading": True}, "cpu_ram_efficient_loading=True: expected False"),
        ({"activation_checkpointing": True}, "activation_checkpointing=True: expected False"),
        ({"cpu_offload": True}, "offload_params=True: expected False"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # the library's, of version 1
def test_settings_of_fsdp_that_are_not_supported_are_refused_by_name(settings, words):
    sharding.check(accelerator_with(**SUPPORTED))
    with pytest.raises(ConfigError, match=words):
        sharding.check(accelerator_with(**SUPPORTED | settings))


def test_another_way_to_distribute_is_refused():
    with pytest.raises(ConfigError, match="distributed_type DEEPSPEED"):
        sharding.check(SimpleNamespace(distributed_type=DistributedType.DEEPSPEED))
