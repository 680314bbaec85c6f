"""The monotone cell against dense matrices over whole sequences, against loops, and its parts against textbook formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from deq_lm.cells import Memory, MonotoneCell, MonotoneConfig
from deq_lm.cells.causal_operator import CausalOperator
from deq_lm.cells.norm_bound import spectral_norm_bound
from deq_lm.cells.prox import relu, soft_threshold, tanh
from deq_lm.errors import UnusedSettingWarning

BATCH, LENGTH, PAST, WIDTH, HEADS = 2, 6, 5, 8, 2


def make(*, seed: int = 0, **options) -> MonotoneCell:
    torch.manual_seed(seed)
    sizes = {"d_model": WIDTH, "num_heads": HEADS, "num_taps": 3, "mem_len": PAST, "init_std": 0.4}
    return MonotoneCell(MonotoneConfig(**{**sizes, **options})).double().eval()


def states(length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, length, WIDTH, dtype=torch.float64, generator=generator)


def dense(blocks: Tensor, length: int) -> Tensor:
    """W of a sequence, (L D, L D), block by block."""
    width = blocks.shape[0]
    matrix = blocks.new_zeros(length, width, length, width)
    for t in range(length):
        for k, block in enumerate(blocks.split(width, dim=1)):
            if k <= t:
                matrix[t, :, t - k] = block
    return matrix.flatten(2).flatten(0, 1)


def symmetric_eigenvalues(matrix: Tensor) -> Tensor:
    return torch.linalg.eigvalsh((matrix + matrix.T) / 2)


ADVERSARIAL = {
    "drawn": lambda cell: None,
    "large taps": lambda cell: cell.taps.mul_(1e4),
    "aligned taps": lambda cell: cell.taps.copy_(1e3 * torch.ones(WIDTH, WIDTH)),  # all push one way
    "opposed taps": lambda cell: cell.taps.copy_(-50 * torch.eye(WIDTH)),
    "no taps": lambda cell: cell.taps.zero_(),
    "large rotation": lambda cell: cell.rotation.mul_(1e3),
    "large damping": lambda cell: cell.damping.mul_(1e2),
    "no damping": lambda cell: (cell.damping.zero_(), cell.taps.copy_(torch.eye(WIDTH))),
    "least mixing": lambda cell: (cell.damping.zero_(), cell.mixing_logit.fill_(-50.0), cell.taps.mul_(1e4)),
    "most mixing": lambda cell: (cell.damping.zero_(), cell.mixing_logit.fill_(50.0), cell.taps.mul_(1e4)),
}


@pytest.mark.parametrize(("margin", "max_feedback"), [(0.05, None), (0.7, None), (0.3, 0.5)])
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_one_minus_w_has_the_margin_and_the_norm_bound_on_a_whole_sequence_with_memory(
    name: str, margin: float, max_feedback: float | None
):
    """By the eigenvalues of the dense symmetric part, of memory and segment as one sequence and of parts of it."""
    for seed in range(3):
        cell = make(seed=seed, margin=margin, max_feedback=max_feedback)
        with torch.no_grad():
            ADVERSARIAL[name](cell)
            blocks, lipschitz = cell.operator()
        rounding = 1e-13 * lipschitz.item()
        one_minus = torch.eye((PAST + LENGTH) * WIDTH, dtype=torch.float64) - dense(blocks, PAST + LENGTH)
        smallest = symmetric_eigenvalues(one_minus)[0]
        assert smallest >= margin - rounding
        assert torch.linalg.matrix_norm(one_minus, 2) <= lipschitz + rounding
        if max_feedback is not None:  # up to what the bounds are above the norms
            assert lipschitz <= (margin + 2 * cell.mixing.item() + 2 * max_feedback) * WIDTH ** (1 / 128)
        for start, end in ((PAST, PAST + LENGTH), (0, 3), (2, 3)):  # the segment; a prefix; one position
            part = slice(start * WIDTH, end * WIDTH)
            assert symmetric_eigenvalues(one_minus[part, part])[0] >= margin - rounding


def test_the_margin_is_all_there_is_where_taps_push_one_way_in_a_long_sequence():
    """The bound is sharp: a constant sequence along the common direction of the taps nearly attains it."""
    cell = make(margin=0.3)
    with torch.no_grad():
        ADVERSARIAL["no damping"](cell)
        ADVERSARIAL["aligned taps"](cell)
        blocks, _ = cell.operator()
    one_minus = torch.eye(60 * WIDTH, dtype=torch.float64) - dense(blocks, 60)
    assert 0.3 - 1e-12 <= symmetric_eigenvalues(one_minus)[0] < 0.31


def test_padding_keeps_the_margin():
    cell = make(margin=0.4)
    mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    mask[0, 2:4] = False
    with torch.no_grad():
        form = cell.bind(states(LENGTH, 1), key_mask=mask).proximal_form
        units = torch.eye(BATCH * LENGTH * WIDTH, dtype=torch.float64).unflatten(1, (BATCH, LENGTH, WIDTH))
        columns = [form.operator(unit).flatten() for unit in units]
    matrix = torch.stack(columns, dim=1)
    assert symmetric_eigenvalues(torch.eye(len(matrix)).double() - matrix)[0] >= 0.4 - 1e-12
    assert not matrix[~mask.flatten().repeat_interleave(WIDTH)].any()


def test_the_margin_and_the_norm_are_the_same_for_any_tokens():
    """Constants: a bound that looked at a sequence would carry its future into every step size."""
    cell = make()
    bound = [cell.bind(states(LENGTH, seed), Memory(states(PAST, seed), states(PAST, seed))) for seed in (1, 2)]
    assert bound[0].margin == bound[1].margin
    assert torch.equal(bound[0].lipschitz, bound[1].lipschitz)


def by_loops(cell: MonotoneCell, z: Tensor, x: Tensor) -> Tensor:
    """The whole past in z and x, one position at a time, by the formulas of the docstrings."""
    head_width = WIDTH // HEADS
    blocks = cell.operator()[0].split(WIDTH, dim=1)
    query = x @ cell.query.weight.T + cell.query.bias
    key, value = (x @ cell.key_value.weight.T).split(WIDTH, dim=-1)
    out = torch.zeros_like(x)
    for t in range(x.shape[1]):
        attention = torch.zeros(BATCH, WIDTH, dtype=torch.float64)
        for head in range(HEADS):
            part = slice(head * head_width, (head + 1) * head_width)
            scores = []
            for s in range(t + 1):
                angles = [(t - s) / 10000 ** (2 * i / WIDTH) for i in range(WIDTH // 2)]
                sinusoid = torch.tensor([*map(math.sin, angles), *map(math.cos, angles)], dtype=torch.float64)
                match = key[:, s, part] + (cell.distance.weight @ sinusoid)[part]
                scores.append((query[:, t, part] * match).sum(-1) / math.sqrt(head_width))
            weights = torch.stack(scores, dim=-1).softmax(-1)
            attention[:, part] = torch.einsum("bs,bse->be", weights, value[:, : t + 1, part])
        content = cell.norm(x[:, t] + attention @ cell.merge.weight.T)
        argument = content @ cell.inject.weight.T + cell.inject.bias
        for k, block in enumerate(blocks[: t + 1]):
            argument = argument + z[:, t - k] @ block.T
        out[:, t] = cell.config.activation(argument, 1.0)
    return out


@pytest.mark.parametrize("options", [{}, {"num_taps": 0}, {"num_taps": 9}, {"prox": "soft_threshold"}], ids=str)
def test_an_evaluation_with_memory_equals_loops_over_the_whole_past(options: dict):
    cell = make(**options)
    z, x = states(PAST + LENGTH, 1), states(PAST + LENGTH, 2)
    with torch.no_grad():
        expected = by_loops(cell, z, x)
        whole = cell.bind(x)(z)
        second = cell.bind(x[:, PAST:], Memory(z[:, :PAST], x[:, :PAST]))(z[:, PAST:])
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(second, expected[:, PAST:], rtol=0, atol=1e-12)


def test_taps_that_are_none_have_a_gradient_too_as_ddp_expects_of_every_parameter():
    cell = make(num_taps=0)
    cell.bind(states(LENGTH, 2))(states(LENGTH, 1)).sum().backward()
    assert [name for name, parameter in cell.named_parameters() if parameter.grad is None] == []


def test_the_parts_put_together_are_f_to_the_bit_and_attention_is_not_computed_again():
    cell = make()
    f = cell.bind(states(LENGTH, 2), Memory(states(PAST, 3), states(PAST, 4)))
    calls = []
    cell.merge.register_forward_hook(lambda *_: calls.append(1))
    form, z = f.proximal_form, states(LENGTH, 1)
    assert torch.equal(form.prox(form.affine(z), 1.0), f(z))
    assert torch.equal(form(z), f(z))
    assert not calls


def test_under_autocast_f_is_computed_in_float32():
    cell = make().float()
    z, x = states(LENGTH, 1).float(), states(LENGTH, 2).float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        f = cell.bind(x)
        injection = f.tensors["injection"]
        exact = torch.autocast("cpu", enabled=False)
        with exact:
            expected = cell.config.activation(CausalOperator(f.tensors["blocks"])(z) + injection, 1.0)
        assert torch.equal(f(z), expected)
        half = cell.bfloat16().bind(x.bfloat16())
        assert half.tensors["blocks"].dtype == half(z).dtype == torch.float32


@pytest.mark.parametrize("num_taps", [0, 1, 3, 9])
@pytest.mark.parametrize("step", [0.1, 1.0, 7.0])
def test_the_resolvent_is_the_dense_inverse(num_taps: int, step: float):
    cell = make(num_taps=num_taps)
    with torch.no_grad():
        operator = CausalOperator(cell.operator()[0])
        r = states(LENGTH, 1)
        identity = torch.eye(LENGTH * WIDTH, dtype=torch.float64)
        matrix = identity + step * (identity - dense(operator.blocks, LENGTH))
        expected = torch.linalg.solve(matrix, r.flatten(1).T).T.view_as(r)
        torch.testing.assert_close(operator.resolvent(step)(r), expected, rtol=0, atol=1e-12)


def test_with_padding_anywhere_the_resolvent_undoes_the_operator():
    mask = torch.ones(BATCH, LENGTH, 1, dtype=torch.bool)
    mask[0, 0] = mask[0, 3] = mask[1, 5] = False
    with torch.no_grad():
        operator, r = CausalOperator(make().operator()[0], mask), states(LENGTH, 1)
        z = operator.resolvent(0.7)(r)
    torch.testing.assert_close(z + 0.7 * (z - operator(z)), r, rtol=0, atol=1e-12)


def test_the_transposed_operator_is_the_dense_transpose_in_reversed_time():
    with torch.no_grad():
        operator, z = CausalOperator(make().operator()[0]), states(LENGTH, 1)
        expected = (z.flatten(1) @ dense(operator.blocks, LENGTH)).view_as(z)
        torch.testing.assert_close(operator.transposed()(z.flip(1)).flip(1), expected, rtol=0, atol=1e-12)


SLOPES = {  # h', where h is smooth
    "relu": (relu, lambda x: torch.zeros_like(x)),
    "soft_threshold": (lambda v, step: soft_threshold(v, step, threshold=0.3), lambda x: 0.3 * x.sign()),
    "tanh": (tanh, lambda x: x.atanh() - x),
}


@pytest.mark.parametrize("step", [1e-6, 1e-3, 0.1, 0.9, 1.0, 1.5, 20.0, 1e3])
@pytest.mark.parametrize("name", SLOPES)
def test_a_proximal_map_meets_its_optimality_condition_at_every_step(name: str, step: float):
    """x + step h'(x) = v where x is off the kinks; at a kink, the subgradient allows what is left."""
    prox, slope = SLOPES[name]
    v = torch.linspace(-6, 6, 1001, dtype=torch.float64) * max(1.0, step) / 3
    x = prox(v, step)
    smooth = (x != 0) & (x.abs() < 1 - 1e-9) if name == "tanh" else x != 0
    torch.testing.assert_close((x + step * slope(x))[smooth], v[smooth], rtol=1e-7, atol=1e-9)
    assert smooth.sum() > 100
    at_zero = v[x == 0]
    limits = {"relu": (-math.inf, 0.0), "soft_threshold": (-0.3 * step, 0.3 * step), "tanh": (0.0, 0.0)}[name]
    assert ((at_zero >= limits[0]) & (at_zero <= limits[1])).all()
    assert (x.diff() >= 0).all()
    assert (x.diff() <= v.diff() * (1 + 1e-9)).all()  # nonexpansive


def test_tanh_is_the_proximal_map_of_step_one_and_its_gradients_are_right():
    v = torch.linspace(-3, 3, 41, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(tanh(v, 1.0), v.tanh(), rtol=0, atol=0)
    torch.testing.assert_close(tanh(v, torch.tensor(1.0, dtype=torch.float64)), v.tanh(), rtol=0, atol=1e-14)
    for step in (0.2, 3.0):
        assert torch.autograd.gradcheck(lambda v, step=step: tanh(v, step), (v,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e30])
def test_the_norm_bound_is_above_and_close_at_any_scale(dtype: torch.dtype, scale: float):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(3, 40, 40, generator=generator, dtype=dtype)
    flat = torch.linalg.qr(drawn).Q  # all singular values alike: the worst case
    for matrix in (drawn, flat, drawn @ torch.diag(torch.logspace(0, -6, 40, dtype=dtype)), torch.ones_like(drawn)):
        exact = torch.linalg.matrix_norm((scale * matrix).double(), 2)
        bound = spectral_norm_bound(scale * matrix).double()
        assert (bound >= exact).all()
        assert (bound <= exact * 40 ** (1 / 128) * (1 + 1e-5) + 1e-37).all()


def test_the_norm_bound_has_a_gradient_and_a_finite_one_at_zero():
    matrix = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(spectral_norm_bound, (matrix,))
    zero = torch.zeros(1, 4, 4, requires_grad=True)
    spectral_norm_bound(zero).sum().backward()
    assert zero.grad is not None
    assert zero.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 10, "num_heads": 3}, "not divisible by num_heads=3"),
        ({"num_taps": -1}, "num_taps=-1: expected 0"),
        ({"max_feedback": 0.0}, "max_feedback=0.0: expected a value above 0, or None"),
        ({"margin": 0.0}, "margin=0.0: expected a value above 0"),
        (
            {"min_mixing": 0.5, "max_mixing": 0.4},
            "min_mixing=0.5, max_mixing=0.4: expected 0 < min_mixing <= max_mixing",
        ),
        ({"prox": "gelu"}, "prox='gelu': expected 'relu', 'soft_threshold' or 'tanh'"),
        ({"prox": "soft_threshold", "threshold": -1.0}, "threshold=-1.0: expected 0 or more"),
    ],
)
def test_impossible_settings_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        MonotoneConfig(**options)


def test_a_threshold_that_nothing_reads_warns():
    with pytest.warns(UnusedSettingWarning, match=r"threshold=0.5 with prox='relu': no effect"):
        MonotoneConfig(threshold=0.5)
