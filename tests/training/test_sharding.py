"""FSDP2, on two CPU processes: the way Accelerate prepares it, with every parameter in two parts."""

import io
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from processes import launch
from safetensors.torch import load
from tiny_run import make_recipe, make_state
from torch.distributed.tensor import DTensor

from deq_lm.data.encoding import prepare
from deq_lm.errors import ConfigError
from deq_lm.evaluation import evaluate_perplexity
from deq_lm.solvers import StoppingRule
from deq_lm.training import checkpoint, sharding
from deq_lm.training.loop import train_step

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

SETTINGS = (
    "training.clip_norm=1.0e-3",
    "training.phases=[]",
    "training.jacobian=null",
    "training.max_steps=8",
    "training.schedule.warmup_steps=0",
    "model.cell.dropout=0.0",
    "model.cell.init_std=0.2",
    "model.adjoint={name: implicit, stopping: {max_steps: 200, rtol: 1.0e-11, patience: null}}",
)


def plugin(**changes) -> FullyShardedDataParallelPlugin:
    settings = {
        "fsdp_version": 2,
        "reshard_after_forward": False,
        "auto_wrap_policy": "transformer_based_wrap",
        "cpu_ram_efficient_loading": False,
    }
    return FullyShardedDataParallelPlugin(**{**settings, **changes})


def accelerator_of(kind: str, **changes) -> Accelerator:
    """Accelerate refuses FSDP on a CPU when it reads its configuration; what it does with a model then works there."""
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(1)
    accelerator = Accelerator()
    if kind == "fsdp":
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin(**changes)
    return accelerator


def prepared(folder: Path, accelerator: Accelerator):
    """A state in float64, sharded if the accelerator does that, whose solves take more steps on the second process."""
    recipe = make_recipe(folder, *SETTINGS)
    state, identity, tokenizer = make_state(recipe, accelerator)
    state.model.double()
    rules = (StoppingRule(max_steps=200, rtol=1e-9, patience=None), StoppingRule.fixed(60))
    state.model.model.layers.stopping = rules[accelerator.process_index]
    model, state.optimizer = sharding.prepare(accelerator, state.model, state.optimizer)
    return recipe, model, state, identity, tokenizer


def four_steps(folder: Path, kind: str, *, restart: bool = False) -> None:
    """Train; leave the weights, the losses, the counts, and what a checkpoint and an evaluation hold."""
    accelerator = accelerator_of(kind)
    rank = accelerator.process_index
    recipe, model, state, identity, tokenizer = prepared(folder, accelerator)
    checkpoints = folder / f"{kind}_{accelerator.num_processes}_{restart}"
    facts = {"losses": [], "norms": [], "evaluations": []}
    for i in range(4):
        if restart and i == 2:
            checkpoint.save(checkpoints, state, identity, tokenizer, accelerator, keep=9)
            recipe, model, state, identity, tokenizer = prepared(folder, accelerator)  # begin anew
            checkpoint.restore(checkpoint.newest_complete(checkpoints), state, identity, rank=rank)
        before = state.interval.nll_nats
        result = train_step(accelerator, model, state, recipe, stop_requested=False)
        facts["losses"].append(state.interval.nll_nats - before)
        facts["norms"].append(result.grad_norm)
    facts["evaluations"] = state.interval.solver_evaluations
    facts["sharded"] = sum(isinstance(parameter, DTensor) for parameter in state.model.parameters())
    facts["local"] = sum(
        (parameter.to_local() if isinstance(parameter, DTensor) else parameter).numel()
        for parameter in state.model.parameters()
    )
    whole = sharding.whole_model(state.model)
    facts["weights"] = {name: parameter.detach() for name, parameter in whole.named_parameters()}
    result = evaluate_perplexity(whole, prepare(recipe.data).splits["valid"], recipe.evaluation, accelerator)
    facts["valid"] = (result.perplexity.nll_nats, result.perplexity.num_tokens)
    path = checkpoint.save(checkpoints, state, identity, tokenizer, accelerator, keep=9)
    facts["files"] = {name: (path / name).read_bytes() for name in ("model.safetensors", "optimizer.pt")}
    torch.save(facts, folder / f"{kind}_{restart}_{accelerator.num_processes}_{rank}.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharding")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        make_recipe(folder)  # the corpus, before two processes look for it
        four_steps(folder, "ddp")
        launch(four_steps, folder, "ddp")
        launch(four_steps, folder, "fsdp")
        launch(restarted, folder, "fsdp")
    AcceleratorState._reset_state(reset_partial_state=True)

    def facts(name: str, rank: int = 0):
        return torch.load(folder / f"{name}_{rank}.pt")

    return facts


def restarted(folder: Path, kind: str) -> None:
    four_steps(folder, kind, restart=True)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_with_unequal_solves_train_as_one(runs, kind):
    one, two = runs("ddp_False_1"), [runs(f"{kind}_False_2", rank) for rank in (0, 1)]
    fewer, more = (facts["evaluations"] for facts in two)
    assert len(fewer) == len(more) == 16
    assert all(a < b for a, b in zip(fewer, more, strict=True))
    for facts in two:
        for name in ("losses", "norms"):
            assert facts[name] == pytest.approx(one[name], rel=1e-6)
        for name, weight in one["weights"].items():
            torch.testing.assert_close(facts["weights"][name], weight, rtol=1e-6, atol=1e-8, msg=name)


def test_each_process_holds_its_part_of_every_parameter(runs):
    first, second, one = runs("fsdp_False_2", 0), runs("fsdp_False_2", 1), runs("ddp_False_1")
    assert first["sharded"] == second["sharded"] == len(one["weights"])
    assert first["local"] + second["local"] == one["local"]
    assert abs(first["local"] - second["local"]) < 0.1 * one["local"]


def test_validation_of_a_sharded_model_is_that_of_the_whole_one(runs):
    nats, num_tokens = runs("ddp_False_1")["valid"]
    for rank in (0, 1):
        found, count = runs("fsdp_False_2", rank)["valid"]
        assert count == num_tokens
        assert found == pytest.approx(nats, rel=1e-6)


def test_a_sharded_run_resumes_where_it_was(runs):
    whole, again = runs("fsdp_False_2"), runs("fsdp_True_2")
    assert again["losses"] == pytest.approx(whole["losses"], rel=1e-12)
    for name, weight in whole["weights"].items():
        torch.testing.assert_close(again["weights"][name], weight, rtol=1e-10, atol=1e-13, msg=name)


def test_a_checkpoint_of_a_sharded_run_is_that_of_a_whole_one(runs):
    ours, plain = (load(runs(name)["files"]["model.safetensors"]) for name in ("fsdp_False_2", "ddp_False_2"))
    assert ours.keys() == plain.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-10, atol=1e-13, msg=name)
    states = [
        torch.load(io.BytesIO(runs(name)["files"]["optimizer.pt"]), weights_only=True)
        for name in ("fsdp_False_2", "ddp_False_2")
    ]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    for i, moments in states[1]["state"].items():
        for name, tensor in moments.items():
            torch.testing.assert_close(states[0]["state"][i][name], tensor, rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fsdp_version": 1, "reshard_after_forward": "FULL_SHARD"}, "fsdp_version=1: expected 2"),
        ({"reshard_after_forward": True}, "reshard_after_forward=True: expected False"),
        ({"cpu_ram_efficient_loading": True}, "cpu_ram_efficient_loading=True: expected False"),
        ({"activation_checkpointing": True}, "activation_checkpointing=True: expected False"),
        ({"cpu_offload": True}, "offload_params=True: expected False"),
    ],
)
def test_settings_of_fsdp_that_cannot_work_are_refused(monkeypatch, changes, words):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    accelerator = accelerator_of("fsdp", **changes)
    try:
        with pytest.raises(ConfigError, match=words):
            sharding.check(accelerator)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_other_ways_to_distribute_are_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    accelerator = accelerator_of("ddp")
    accelerator.state.distributed_type = DistributedType.DEEPSPEED
    try:
        with pytest.raises(ConfigError, match="distributed_type DEEPSPEED"):
            sharding.check(accelerator)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
