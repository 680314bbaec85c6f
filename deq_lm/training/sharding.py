"""Sharding (FSDP2): a process holds a part of every parameter; what is evaluated or saved is whole again.

Processes may need different numbers of solver evaluations. That is no trouble to what averages gradients after the
backward pass, but FSDP also gathers parameters before a unit's forward pass. So the unit is the module that contains the
whole solve (`Equilibrium`), which gathers its parameters once and exchanges nothing inside.

Evaluation and checkpoints take whole tensors: their numbers and files do not depend on how, or whether, a run is sharded.
Without sharding all functions here leave things as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from deq_lm.equilibrium import Equilibrium
from deq_lm.errors import ConfigError
from deq_lm.evaluation.modes import device_of, seeded
from deq_lm.modeling import DEQLMConfig, DEQLMForCausalLM

DDP = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)

EXPECTED = {
    "fsdp_version": (2, "version 1 hides the parameters from the optimizer"),
    "reshard_after_forward": (False, "the output layer reads the tables of the embedding, after the embedding is done"),
    "cpu_ram_efficient_loading": (False, "every process draws the same initial weights"),
    "activation_checkpointing": (
        False,
        "it would solve again in the backward pass; an equilibrium keeps no activations",
    ),
    "offload_params": (False, "it has not been tried"),
}
"""Of Accelerate's FSDP plugin: what is supported, and why nothing else."""


def check(accelerator: Accelerator) -> None:
    """Refuse what Accelerate can be configured to and a run cannot do.

    Raises:
        ConfigError: for a way to distribute other than DDP and FSDP2, and for settings of FSDP that are not supported.
    """
    kind = accelerator.distributed_type
    if kind in DDP:
        return
    if kind != DistributedType.FSDP:
        raise ConfigError(
            f"distributed_type {kind.value}, from accelerate launch or its configuration: expected one process, MULTI_GPU "
            "(DDP) or FSDP. recipes/accelerate has a configuration for each."
        )
    plugin = _plugin(accelerator)
    found = {name: getattr(plugin, name, None) for name in EXPECTED}
    found["offload_params"] = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    for name, (expected, reason) in EXPECTED.items():
        if found[name] != expected:
            raise ConfigError(
                f"fsdp_config {name}={found[name]}: expected {expected}; {reason}. "
                "recipes/accelerate/gpu_8_fsdp2.yaml has all of them right."
            )


def prepare(accelerator: Accelerator, model: DEQLMForCausalLM, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
    """As `accelerator.prepare`; under FSDP2 with the mixed precision that a run has everywhere else.

    Accelerate would compute in bfloat16 copies of the parameters, reduce gradients in bfloat16 and hand out the loss in
    it, a number of three digits. Here parameters, gradients and outputs are float32, and products bfloat16 by autocast.

    Returns:
        The model to call in training, and the optimizer.

    Raises:
        ConfigError: see `check`; or a module inside the solve is sharded on its own.
    """
    check(accelerator)
    if accelerator.distributed_type == DistributedType.FSDP:
        _plugin(accelerator).mixed_precision_policy = MixedPrecisionPolicy()
        if accelerator.mixed_precision == "bf16":
            model.forward = accelerator.autocast()(model.forward)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    for name, module in model.named_modules():
        if isinstance(module, Equilibrium) and any(isinstance(part, FSDPModule) for part in list(module.modules())[1:]):
            raise ConfigError(
                f"fsdp_config shards modules inside {name}, where processes that need different numbers of solver "
                "evaluations would wait for each other for ever. Give fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP, and "
                "no fsdp_transformer_layer_cls_to_wrap: the model names the units itself."
            )
    for method in ("nll", "logits"):  # a head is called by these names; without sharding this has no effect
        register_fsdp_forward_method(model.lm_head, method)
    return wrapped, optimizer


def _plugin(accelerator: Accelerator) -> FullyShardedDataParallelPlugin:
    plugin = accelerator.state.fsdp_plugin
    assert plugin is not None
    return plugin


def is_sharded(model: nn.Module) -> bool:
    """Whether a process holds parts of its parameters only."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """The tensor of which this process may have a part; all processes have to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_model(model: DEQLMForCausalLM) -> DEQLMForCausalLM:
    """The model, if it is not sharded; else an ordinary one with the same weights, for which all processes have to ask."""
    if not is_sharded(model):
        return model
    weights = {name: whole(parameter.detach()) for name, parameter in model.named_parameters()}
    copy = _model_like(model)
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            parameter.copy_(weights[name])
    return copy


def load_weights(model: DEQLMForCausalLM, path: Path) -> None:
    """Read the weights of a whole model from a safetensors file, each process its own part of them."""
    if not is_sharded(model):
        load_model(model, path)
        return
    copy = _model_like(model)
    load_model(copy, path)
    weights = dict(copy.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_part(weights[name].detach(), parameter))


def whole_optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """`optimizer.state_dict()` with whole tensors, for which all processes have to ask."""
    return _map_state(optimizer.state_dict(), lambda _, value: whole(value).cpu() if is_part(value) else value)


def load_optimizer_state(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """The inverse of `whole_optimizer_state`, each process its own part."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def own(index: int, value: Any) -> Any:
        parameter = parameters[index]
        return _part(value, parameter) if isinstance(value, Tensor) and value.shape == parameter.shape else value

    optimizer.load_state_dict(_map_state(state, own))


def is_part(value: Any) -> bool:
    """Whether a value is a tensor of which this process has a part."""
    return isinstance(value, DTensor)


def _part(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a tensor that all processes have, cut as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _model_like(model: DEQLMForCausalLM) -> DEQLMForCausalLM:
    """An ordinary model of the same configuration, mode, type and device, its weights to be filled in."""
    device = device_of(model)
    with seeded(0, device):  # its initial weights, which nobody sees, are not to be drawn from the run's random numbers
        config = model.config
        assert isinstance(config, DEQLMConfig)
        copy = DEQLMForCausalLM(config)
    nn.Module.to(copy, device, next(model.parameters()).dtype)
    return copy.train(model.training)


def _map_state(state: Mapping[str, Any], change: Callable[[int, Any], Any]) -> dict[str, Any]:
    """An optimizer's state with `change(index of the parameter, value)` in the place of each value."""
    values = {i: {name: change(i, value) for name, value in own.items()} for i, own in state["state"].items()}
    return {**state, "state": values}
