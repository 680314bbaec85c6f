"""The Transformer-XL cell against loops, against itself cut in two, and its promises to a solver."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from deq_lm.cells import Memory, TransformerXLCell, TransformerXLConfig

BATCH, LENGTH, PAST, WIDTH, HEADS = 2, 5, 3, 8, 2


def make(**options) -> TransformerXLCell:
    torch.manual_seed(0)
    sizes = {"d_model": WIDTH, "num_heads": HEADS, "d_inner": 12, "mem_len": PAST, "init_std": 0.4}
    config = TransformerXLConfig(**{**sizes, **options})
    cell = TransformerXLCell(config).double().eval()
    for parameter in cell.gates.values():  # which begin at 0
        nn.init.normal_(parameter)
    return cell


def states(length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, length, WIDTH, dtype=torch.float64, generator=generator)


def attention_by_loops(cell: TransformerXLCell, z: Tensor, x: Tensor) -> Tensor:
    """Dai et al. 2019, section 3.3, with Bai et al.'s injection: one number at a time, the whole past in z and x."""
    width = WIDTH // HEADS
    projected = z @ cell.qkv.weight.T
    if cell.config.injection in ("attention", "both"):
        projected = projected + x @ cell.inject.weight.T
    query, key, value = projected.split(WIDTH, dim=-1)
    out = torch.zeros_like(z)
    for batch in range(z.shape[0]):
        for head in range(HEADS):
            part = slice(head * width, (head + 1) * width)
            for i in range(z.shape[1]):
                scores = []
                first = max(0, i + 1 - (cell.config.attention_window or i + 1))
                for j in range(first, i + 1):
                    angles = [(i - j) / 10000 ** (2 * k / WIDTH) for k in range(WIDTH // 2)]
                    embedding = torch.tensor([*map(math.sin, angles), *map(math.cos, angles)], dtype=torch.float64)
                    r = (cell.distance.weight @ embedding)[part]
                    q = query[batch, i, part]
                    content = (q + cell.content_bias[part]) @ key[batch, j, part]
                    scores.append((content + (q + cell.distance_bias[part]) @ r) / math.sqrt(width))
                weights = torch.stack(scores).softmax(0)
                out[batch, i, part] = sum(w * value[batch, j, part] for j, w in enumerate(weights, first))
    if cell.config.norm_attention:
        out = cell.vector_norm(out)
    return out @ cell.merge.weight.T


def by_loops(cell: TransformerXLCell, z: Tensor, x: Tensor) -> Tensor:
    def feed_forward(h: Tensor) -> Tensor:
        return cell.contract(cell.expand(h).relu())

    def joined(carried: Tensor, branch: Tensor, read: Tensor, gate: str) -> Tensor:
        if cell.config.gate is None:
            return carried + branch
        weights = 1 / (1 + torch.exp(-(read @ cell.gates[gate].T + cell.gates[f"{gate}_bias"])))
        return 2 * weights * carried + (2 - 2 * weights) * branch

    added = x if cell.config.injection in ("residual", "both") else 0.0
    post = cell.config.norm == "post"
    read = z if post else cell.attention_norm(z)
    h = joined(z, attention_by_loops(cell, read, x), read, "attention_gate") + added
    h = (cell.attention_norm if post else cell.output_norm)(h)
    out = joined(h, feed_forward(h), h, "output_gate")
    return cell.output_norm(out) if post else out


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"weight_norm": True},
        {"norm_attention": True},
        {"gate": "highway"},
        {"gate": "highway", "injection": "residual", "weight_norm": True},
        {"injection": "none"},
        {"injection": "residual"},
        {"injection": "both"},
        {"attention_window": 1},
        {"attention_window": 4},
    ],
    ids=str,
)
def test_an_evaluation_with_memory_equals_four_nested_loops(norm, variant: dict):
    cell = make(norm=norm, **variant)
    z, x = states(PAST + LENGTH, 1), states(PAST + LENGTH, 2)
    with torch.no_grad():
        expected = by_loops(cell, z, x)
        whole = cell.bind(x)(z)
        second = cell.bind(x[:, PAST:], Memory(z[:, :PAST], x[:, :PAST]))(z[:, PAST:])
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(second, expected[:, PAST:], rtol=0, atol=1e-12)


def test_what_does_not_depend_on_z_is_computed_once_per_solve():
    cell = make(weight_norm=True, dropout=0.5).train()
    calls = []
    for linear in cell._linears():
        linear.parametrizations.weight.register_forward_hook(lambda *_, name=linear: calls.append(name))
    f = cell.bind(states(LENGTH, 2), Memory(states(PAST, 3), states(PAST, 4)))
    assert len(calls) == 6
    for seed in range(3):
        f(states(LENGTH, seed))
    assert len(calls) == 6


def test_under_autocast_weights_are_converted_once_per_solve():
    class Conversions(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.sizes: list[int] = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket is torch.ops.aten._to_copy:
                self.sizes.append(args[0].numel())
            return function(*args, **(kwargs or {}))

    cell = make(weight_norm=True).float()
    z, x = states(LENGTH, 1).float(), states(LENGTH, 2).float()
    memory = Memory(states(PAST, 3).float(), states(PAST, 4).float())
    with torch.autocast("cpu", torch.bfloat16):
        f = cell.bind(x, memory)
        with torch.no_grad(), Conversions() as conversions:
            f(z)
    assert set(conversions.sizes) == {z.numel()}


def test_under_autocast_the_evaluation_is_rounded_and_the_state_is_not():
    cell = make().float()
    z, x = states(LENGTH, 1).float(), states(LENGTH, 2).float()
    with torch.no_grad():
        exact = cell.bind(x)(z)
        with torch.autocast("cpu", torch.bfloat16):
            f = cell.bind(x)
        rounded = f(z)  # outside the context, under the state at bind
    assert rounded.dtype == torch.float32
    assert 1e-4 < (rounded - exact).norm() / exact.norm() < 2e-2


def test_one_dropout_mask_a_solve_over_features_and_not_over_positions():
    cell = make(dropout=0.5).train()
    z, x = states(LENGTH, 1), states(LENGTH, 2)
    f = cell.bind(x)
    assert torch.equal(f(z), f(z))
    assert not torch.equal(f(z), cell.bind(x)(z))
    mask = f.tensors["attention_dropout"]
    assert mask.shape == (BATCH, 1, WIDTH)
    assert set(mask.unique().tolist()) == {0.0, 2.0}
    assert "attention_dropout" not in cell.eval().bind(x).tensors


@pytest.mark.parametrize("weight_norm", [False, True])
def test_initial_weights_have_the_stated_spread_also_under_weight_norm(weight_norm: bool):
    torch.manual_seed(0)
    cell = TransformerXLCell(TransformerXLConfig(d_model=128, d_inner=256, weight_norm=weight_norm, init_std=0.03))
    for linear in cell._linears():
        assert linear.weight.std().item() == pytest.approx(0.03, rel=0.03)


def test_weight_norm_starts_from_the_very_weights_that_are_drawn_without_it():
    plain, normalized = make(weight_norm=False), make(weight_norm=True)
    for a, b in zip(plain._linears(), normalized._linears(), strict=True):
        torch.testing.assert_close(a.weight, b.weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_gated_cell_begins_as_the_cell_without_gates_to_the_bit_and_learns_to_differ(norm: str, dropout: float):
    images, cells = [], []
    for gate in (None, "highway"):
        torch.manual_seed(0)
        cell = TransformerXLCell(TransformerXLConfig(d_model=64, gate=gate, norm=norm, dropout=dropout)).train()
        torch.manual_seed(1)  # of the dropout masks
        z, x = torch.randn(2, 9, 64), torch.randn(2, 9, 64)
        images.append(cell.bind(x)(z))
        cells.append(cell)
    assert torch.equal(*images)
    gates = list(cells[1].gates.values())
    assert len(gates) == 4
    gradients = torch.autograd.grad((images[1] * torch.randn(64)).sum(), gates)
    assert all(gradient.abs().max() > 1e-3 for gradient in gradients)


@pytest.mark.parametrize(("bias", "kept"), [(40.0, "carried"), (-40.0, "branch")])
def test_an_open_gate_carries_its_state_through_and_a_closed_one_takes_the_branch_alone(bias: float, kept: str):
    cell = make(gate="highway", norm="pre", injection="none")
    for name, parameter in cell.gates.items():
        nn.init.constant_(parameter, bias if name.endswith("bias") else 0.0)
    z, x = states(LENGTH, 1), states(LENGTH, 2)
    found = cell.bind(x)(z)
    h = cell.output_norm(2 * (z if kept == "carried" else attention_by_loops(cell, cell.attention_norm(z), x)))
    expected = 2 * (h if kept == "carried" else cell.contract(cell.expand(h).relu()))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 10, "num_heads": 3}, "not divisible by num_heads=3"),
        ({"d_inner": 0}, "d_inner=0: expected 1 or more"),
        ({"mem_len": -1}, "mem_len=-1"),
        ({"norm": "middle"}, "norm='middle'"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"attention_window": 0}, "attention_window=0: expected 1 or more"),
        ({"ffn_chunks": 0}, "ffn_chunks=0: expected 1 or more"),
        ({"gate": "gru"}, "gate='gru': expected 'highway', or None for plain residual sums"),
        ({"injection": "values"}, "injection='values': expected 'attention', 'residual', 'both' or 'none'"),
        ({"recompute": "all"}, "recompute='all': expected 'none', 'feed_forward' or 'block'"),
        ({"num_blocks": 0}, "num_blocks=0: expected 1 or more"),
        ({"init_std": 0.0}, "init_std=0.0"),
    ],
)
def test_impossible_sizes_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        TransformerXLConfig(**options)
