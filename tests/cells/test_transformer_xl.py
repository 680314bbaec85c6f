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
    return TransformerXLCell(config).double().eval()


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

    added = x if cell.config.injection in ("residual", "both") else 0.0
    if cell.config.norm == "post":
        h = cell.attention_norm(z + added + attention_by_loops(cell, z, x))
        return cell.output_norm(h + feed_forward(h))
    h = cell.output_norm(z + added + attention_by_loops(cell, cell.attention_norm(z), x))
    return h + feed_forward(h)


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"weight_norm": True},
        {"norm_attention": True},
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


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_future_changes_no_bit_of_the_past(norm, dtype: torch.dtype):
    cell = make(norm=norm).to(dtype)
    z, x = states(LENGTH, 1).to(dtype), states(LENGTH, 2).to(dtype)
    memory = Memory(states(PAST, 3).to(dtype), states(PAST, 4).to(dtype))
    with torch.no_grad():
        before = cell.bind(x, memory)(z)
        for cut in range(1, LENGTH):
            changed_z, changed_x = z.clone(), x.clone()
            changed_z[:, cut:] += 100
            changed_x[:, cut:] -= 50
            after = cell.bind(changed_x, memory)(changed_z)
            assert torch.equal(before[:, :cut], after[:, :cut])
            assert not torch.equal(before[:, cut:], after[:, cut:])


@pytest.mark.parametrize("recorded", [False, True], ids=["solving", "recorded"])
@pytest.mark.parametrize("mixed_precision", [False, True])
def test_the_future_changes_no_bit_of_the_past_at_sizes_that_reach_the_vector_kernels(
    recorded: bool, mixed_precision: bool
):
    torch.manual_seed(0)
    cell = TransformerXLCell(TransformerXLConfig(d_model=64, num_heads=2, d_inner=96, init_std=0.1))
    z, x = torch.randn(2, 70, 64), torch.randn(2, 70, 64)
    memory = Memory(torch.randn(2, 33, 64), torch.randn(2, 33, 64))
    with torch.set_grad_enabled(recorded), torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision):
        before = cell.bind(x, memory)(z)
        for cut in (1, 31, 64, 69):
            changed_z, changed_x = z.clone(), x.clone()
            changed_z[:, cut:] *= -1000
            changed_x[:, cut:] *= -1000
            assert torch.equal(before[:, :cut], cell.bind(changed_x, memory)(changed_z)[:, :cut])


def test_a_sequence_gives_the_same_alone_and_in_a_batch():
    cell = make()
    z, x = states(LENGTH, 1), states(LENGTH, 2)
    memory = Memory(states(PAST, 3), states(PAST, 4))
    with torch.no_grad():
        together = cell.bind(x, memory)(z)
        for entry in range(BATCH):
            one = slice(entry, entry + 1)
            alone = cell.bind(x[one], Memory(memory.z[one], memory.x[one]))(z[one])
            torch.testing.assert_close(alone, together[one], rtol=0, atol=1e-12)


def test_left_padding_that_is_masked_changes_nothing():
    cell = make()
    z, x = states(LENGTH, 1), states(LENGTH, 2)
    padded_z, padded_x = torch.cat([states(4, 5), z], 1), torch.cat([states(4, 6), x], 1)
    mask = torch.tensor([[False] * 4 + [True] * LENGTH] * BATCH)
    with torch.no_grad():
        f = cell.bind(padded_x, key_mask=mask)
        found = f(padded_z)
        torch.testing.assert_close(found[:, 4:], cell.bind(x)(z), rtol=0, atol=1e-12)
        assert torch.equal(found[:, :4], torch.zeros_like(found[:, :4]))
        assert f.tensors["mask"].isfinite().any(dim=-1).all()  # padding sees itself: some kernels give NaN for nothing


def test_at_padding_f_is_zero_and_has_no_gradient():
    cell = make()
    z, x = states(LENGTH, 1).requires_grad_(), states(LENGTH, 2)
    mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    mask[:, 0] = False
    image = cell.bind(x, key_mask=mask)(z)
    assert torch.equal(image[:, 0], torch.zeros(BATCH, WIDTH, dtype=torch.float64))
    image[:, 0].sum().backward()
    assert z.grad is not None
    assert not z.grad.any()


def test_padding_in_memory_is_not_attended_to():
    cell = make()
    z, x = states(LENGTH, 1), states(LENGTH, 2)
    past_z, past_x = states(PAST, 3), states(PAST, 4)
    mask = torch.tensor([[False] * 2 + [True] * (PAST - 2)] * BATCH)
    with torch.no_grad():
        found = cell.bind(x, Memory(past_z, past_x, mask))(z)
        torch.testing.assert_close(found, cell.bind(x, Memory(past_z[:, 2:], past_x[:, 2:]))(z), rtol=0, atol=1e-12)
        together = cell.bind(x, Memory(past_z, past_x, mask), torch.ones(BATCH, LENGTH, dtype=torch.bool))(z)
        torch.testing.assert_close(together, found, rtol=0, atol=1e-12)


def test_key_masks_differ_between_sequences_and_leave_memory_visible():
    cell = make()
    z, x = states(LENGTH, 1), states(LENGTH, 2)
    memory = Memory(states(PAST, 3), states(PAST, 4))
    mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    mask[1, 2] = False
    with torch.no_grad():
        plain, masked = cell.bind(x, memory)(z), cell.bind(x, memory, mask)(z)
        other_memory = Memory(memory.z + 1, memory.x)
        torch.testing.assert_close(masked[0], plain[0], rtol=0, atol=1e-12)
        assert torch.equal(masked[1, :2], plain[1, :2])
        assert not torch.isclose(masked[1, 3:], plain[1, 3:]).all(dim=-1).any()
        unmoved = torch.isclose(cell.bind(x, other_memory, mask)(z), masked).all(dim=-1)
        assert torch.equal(unmoved, ~mask)  # padding is 0 with any memory


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


def test_gradients_reach_every_parameter_and_the_input_and_are_right():
    cell = make(weight_norm=True)
    z, x = states(LENGTH, 1).requires_grad_(), states(LENGTH, 2).requires_grad_()
    memory = Memory(states(PAST, 3), states(PAST, 4))
    cell.bind(x, memory)(z).square().sum().backward()
    assert x.grad.norm() > 0
    assert all(parameter.grad is not None for parameter in cell.parameters())
    assert torch.autograd.gradcheck(lambda z, x: cell.bind(x, memory)(z), (z, x))


def test_a_bound_cell_reads_the_inputs_it_is_given_and_nothing_else():
    cell = make()
    z, x = states(LENGTH, 1), states(LENGTH, 2)
    f = cell.bind(x)
    expected = f(z)
    copies = [tensor.detach().clone() for tensor in f.inputs]
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter += 0.1
    assert not torch.equal(f(z), expected)
    torch.testing.assert_close(f.with_inputs(copies)(z), expected.detach(), rtol=0, atol=1e-12)


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


def test_a_state_dict_restores_the_cell():
    cell, other = make(weight_norm=True), make(weight_norm=True)
    other.reset_parameters()
    z, x = states(LENGTH, 1), states(LENGTH, 2)
    with torch.no_grad():
        assert not torch.equal(cell.bind(x)(z), other.bind(x)(z))
        other.load_state_dict(cell.state_dict())
        assert torch.equal(cell.bind(x)(z), other.bind(x)(z))


def test_it_can_be_built_without_storage_and_filled_later():
    config = TransformerXLConfig(d_model=WIDTH, num_heads=HEADS, weight_norm=True)
    with torch.device("meta"):
        cell = TransformerXLCell(config)
    cell = cell.to_empty(device="cpu")
    for parameter in cell.parameters():
        nn.init.constant_(parameter, float("nan"))
    cell.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in cell.parameters())


def test_memory_keeps_the_last_positions_without_gradient():
    cell = make()
    z, x = states(LENGTH, 1).requires_grad_(), states(LENGTH, 2)
    f = cell.bind(x)
    first = cell.remember(f, z, x, None)
    second = cell.remember(f, z[:, :1], x[:, :1], first)
    assert first is not None
    assert second is not None
    assert torch.equal(second.z, torch.cat([z[:, -2:], z[:, :1]], 1))
    assert not second.z.requires_grad
    assert second.length == PAST


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
        ({"injection": "values"}, "injection='values': expected 'attention', 'residual', 'both' or 'none'"),
        ({"recompute": "all"}, "recompute='all': expected 'none', 'feed_forward' or 'block'"),
        ({"num_blocks": 0}, "num_blocks=0: expected 1 or more"),
        ({"init_std": 0.0}, "init_std=0.0"),
    ],
)
def test_impossible_sizes_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        TransformerXLConfig(**options)


@pytest.mark.parametrize(
    ("width", "past_batch", "mask_length", "past_mask_length", "message"),
    [
        (WIDTH + 1, BATCH, LENGTH, PAST, "d_model is 8"),
        (
            WIDTH,
            BATCH + 1,
            LENGTH,
            PAST,
            r"memory.z of shape \(3, 3, 8\).*expected \(2, 3, 8\). Start with memory=None",
        ),
        (
            WIDTH,
            BATCH,
            LENGTH + PAST,
            PAST,
            r"key_mask of shape \(2, 8\).*expected \(2, 5\), bool, one value a position",
        ),
        (
            WIDTH,
            BATCH,
            LENGTH,
            PAST + 1,
            r"memory.mask of shape \(2, 4\).*expected \(2, 3\), bool, one value a position",
        ),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(
    width: int, past_batch: int, mask_length: int, past_mask_length: int, message: str
):
    past_mask = torch.ones(past_batch, past_mask_length, dtype=torch.bool)
    memory = Memory(torch.zeros(past_batch, PAST, WIDTH), torch.zeros(past_batch, PAST, WIDTH), past_mask)
    mask = torch.ones(BATCH, mask_length, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        make().bind(torch.zeros(BATCH, LENGTH, width), memory, mask)
