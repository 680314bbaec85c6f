"""What every cell must do, whatever it computes: causality, padding, memory, gradients, its promises to a solver."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from deq_lm.cells import (
    Cell,
    CellConfig,
    CoarseRate,
    Memory,
    MonotoneConfig,
    MultiscaleConfig,
    TransformerXLConfig,
)
from deq_lm.modeling.builders import build_cell

BATCH, LENGTH, PAST, WIDTH, HEADS = 2, 5, 3, 8, 2
SIZES = {"d_model": WIDTH, "num_heads": HEADS, "mem_len": PAST, "init_std": 0.4}
CELLS: dict[str, CellConfig] = {
    "post": TransformerXLConfig(**SIZES, d_inner=12, norm="post"),
    "pre": TransformerXLConfig(**SIZES, d_inner=12, norm="pre", weight_norm=True),
    "gated": TransformerXLConfig(**SIZES, d_inner=12, gate="highway", injection="residual", norm_attention=True),
    "monotone": MonotoneConfig(**SIZES, num_taps=2),
    "monotone tanh": MonotoneConfig(**SIZES, num_taps=PAST, prox="tanh"),
    "multiscale": MultiscaleConfig(
        **SIZES, d_inner=12, coarse=(CoarseRate(ratio=2, d_model=4, num_heads=1, d_inner=6),)
    ),
    "multiscale pre": MultiscaleConfig(
        **SIZES, d_inner=12, norm="pre", weight_norm=True, coarse=(CoarseRate(ratio=3, d_model=6, num_heads=2),)
    ),
}


@pytest.fixture(params=CELLS)
def config(request) -> CellConfig:
    return CELLS[request.param]


@pytest.fixture
def cell(config: CellConfig) -> Cell:
    return drawn(config).double().eval()


def drawn(config: CellConfig) -> Cell:
    """With gates, which begin at 0, that are not."""
    torch.manual_seed(0)
    cell = build_cell(config)
    for name, parameter in cell.named_parameters():
        if "gate" in name:
            nn.init.normal_(parameter)
    return cell


def inputs(length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, length, WIDTH, dtype=torch.float64, generator=generator)


def states(cell: Cell, length: int, seed: int) -> Tensor:
    shape = cell.as_state(inputs(length, seed)).shape
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_future_changes_no_bit_of_the_past(cell: Cell, dtype: torch.dtype):
    cell = cell.to(dtype)
    z, x = states(cell, LENGTH, 1).to(dtype), inputs(LENGTH, 2).to(dtype)
    memory = Memory(states(cell, PAST, 3).to(dtype), inputs(PAST, 4).to(dtype))
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
    config: CellConfig, recorded: bool, mixed_precision: bool
):
    cell = drawn(replace(config, d_model=64, init_std=0.1))
    x = torch.randn(2, 70, 64)
    z = torch.randn_like(cell.as_state(x))
    memory = Memory(torch.randn_like(z[:, :33]), torch.randn(2, 33, 64))
    with torch.set_grad_enabled(recorded), torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision):
        before = cell.bind(x, memory)(z)
        for cut in (1, 31, 64, 69):
            changed_z, changed_x = z.clone(), x.clone()
            changed_z[:, cut:] *= -1000
            changed_x[:, cut:] *= -1000
            assert torch.equal(before[:, :cut], cell.bind(changed_x, memory)(changed_z)[:, :cut])


def test_a_sequence_gives_the_same_alone_and_in_a_batch(cell: Cell):
    z, x = states(cell, LENGTH, 1), inputs(LENGTH, 2)
    memory = Memory(states(cell, PAST, 3), inputs(PAST, 4))
    with torch.no_grad():
        together = cell.bind(x, memory)(z)
        for entry in range(BATCH):
            one = slice(entry, entry + 1)
            alone = cell.bind(x[one], Memory(memory.z[one], memory.x[one]))(z[one])
            torch.testing.assert_close(alone, together[one], rtol=0, atol=1e-12)


def test_left_padding_that_is_masked_changes_nothing(cell: Cell):
    z, x = states(cell, LENGTH, 1), inputs(LENGTH, 2)
    padded_z, padded_x = torch.cat([states(cell, 4, 5), z], 1), torch.cat([inputs(4, 6), x], 1)
    mask = torch.tensor([[False] * 4 + [True] * LENGTH] * BATCH)
    with torch.no_grad():
        f = cell.bind(padded_x, key_mask=mask)
        found = f(padded_z)
        torch.testing.assert_close(found[:, 4:], cell.bind(x)(z), rtol=0, atol=1e-12)
        assert torch.equal(found[:, :4], torch.zeros_like(found[:, :4]))
        assert f(padded_z).isfinite().all()  # padding sees itself: some kernels give NaN for nothing


def test_at_padding_f_is_zero_and_has_no_gradient(cell: Cell):
    z, x = states(cell, LENGTH, 1).requires_grad_(), inputs(LENGTH, 2)
    mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    mask[:, 0] = False
    image = cell.bind(x, key_mask=mask)(z)
    assert torch.equal(image[:, 0], torch.zeros_like(z[:, 0]))
    image[:, 0].sum().backward()
    assert z.grad is not None
    assert not z.grad.any()


def test_padding_in_memory_is_not_attended_to(cell: Cell):
    z, x = states(cell, LENGTH, 1), inputs(LENGTH, 2)
    past_z, past_x = states(cell, PAST, 3), inputs(PAST, 4)
    mask = torch.tensor([[False] * 2 + [True] * (PAST - 2)] * BATCH)
    with torch.no_grad():
        found = cell.bind(x, Memory(past_z, past_x, mask))(z)
        torch.testing.assert_close(found, cell.bind(x, Memory(past_z[:, 2:], past_x[:, 2:]))(z), rtol=0, atol=1e-12)
        together = cell.bind(x, Memory(past_z, past_x, mask), torch.ones(BATCH, LENGTH, dtype=torch.bool))(z)
        torch.testing.assert_close(together, found, rtol=0, atol=1e-12)


def test_key_masks_differ_between_sequences_and_leave_memory_visible(cell: Cell):
    z, x = states(cell, LENGTH, 1), inputs(LENGTH, 2)
    memory = Memory(states(cell, PAST, 3), inputs(PAST, 4))
    mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    mask[1, 2] = False
    with torch.no_grad():
        plain, masked = cell.bind(x, memory)(z), cell.bind(x, memory, mask)(z)
        other_memory = Memory(states(cell, PAST, 5), inputs(PAST, 6))
        torch.testing.assert_close(masked[0], plain[0], rtol=0, atol=1e-12)
        assert torch.equal(masked[1, :2], plain[1, :2])
        assert not torch.isclose(masked[1, 3:], plain[1, 3:]).all(dim=-1).any()
        unmoved = torch.isclose(cell.bind(x, other_memory, mask)(z), masked).all(dim=-1)
        assert torch.equal(unmoved, ~mask)  # padding is 0 with any memory


def test_gradients_reach_every_parameter_and_the_input_and_are_right(cell: Cell):
    z, x = states(cell, LENGTH, 1).requires_grad_(), inputs(LENGTH, 2).requires_grad_()
    memory = Memory(states(cell, PAST, 3), inputs(PAST, 4))
    cell.bind(x, memory)(z).square().sum().backward()
    assert x.grad.norm() > 0
    assert all(parameter.grad is not None for parameter in cell.parameters())
    assert torch.autograd.gradcheck(lambda z, x: cell.bind(x, memory)(z), (z, x))


def test_a_bound_cell_reads_the_inputs_it_is_given_and_nothing_else(cell: Cell):
    z, x = states(cell, LENGTH, 1), inputs(LENGTH, 2)
    f = cell.bind(x)
    expected = f(z)
    copies = [tensor.detach().clone() for tensor in f.inputs]
    with torch.no_grad():
        for tensor in [*cell.parameters(), *f.inputs]:
            tensor += 0.1
    assert not torch.equal(f(z), expected)
    torch.testing.assert_close(f.with_inputs(copies)(z), expected.detach(), rtol=0, atol=1e-12)


def test_a_state_dict_restores_the_cell(cell: Cell, config: CellConfig):
    other = build_cell(config).double().eval()
    other.reset_parameters()
    z, x = states(cell, LENGTH, 1), inputs(LENGTH, 2)
    with torch.no_grad():
        assert not torch.equal(cell.bind(x)(z), other.bind(x)(z))
        other.load_state_dict(cell.state_dict())
        assert torch.equal(cell.bind(x)(z), other.bind(x)(z))


def test_it_can_be_built_without_storage_and_filled_later(config: CellConfig):
    with torch.device("meta"):
        cell = build_cell(config)
    cell = cell.to_empty(device="cpu")
    for parameter in cell.parameters():
        nn.init.constant_(parameter, float("nan"))
    cell.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in cell.parameters())


def test_memory_keeps_the_last_positions_without_gradient(cell: Cell):
    z, x = states(cell, LENGTH, 1).requires_grad_(), inputs(LENGTH, 2)
    f = cell.bind(x)
    first = cell.remember(f, z, x, None)
    second = cell.remember(f, z[:, :1], x[:, :1], first)
    assert first is not None
    assert second is not None
    assert torch.equal(second.z, torch.cat([z[:, -2:], z[:, :1]], 1))
    assert not second.z.requires_grad
    assert second.length == PAST


@pytest.mark.parametrize(
    ("width", "past_batch", "mask_length", "past_mask_length", "message"),
    [
        (WIDTH + 1, BATCH, LENGTH, PAST, "d_model is 8"),
        (
            WIDTH,
            BATCH + 1,
            LENGTH,
            PAST,
            r"memory.z of shape \(3, 3, (\d+)\).*expected \(2, 3, \1\). Start with memory=None",
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
    cell: Cell, width: int, past_batch: int, mask_length: int, past_mask_length: int, message: str
):
    past_mask = torch.ones(past_batch, past_mask_length, dtype=torch.bool)
    past_x = torch.zeros(past_batch, PAST, WIDTH)
    memory = Memory(torch.zeros_like(cell.as_state(past_x)), past_x, past_mask)
    mask = torch.ones(BATCH, mask_length, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        cell.bind(torch.zeros(BATCH, LENGTH, width), memory, mask)
