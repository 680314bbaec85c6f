"""The multiscale cell: which element reads which, and that a text has the same chunks however it is cut or padded."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from deq_lm.adjoints import Implicit, Unrolled
from deq_lm.cells import CoarseRate, Memory, MultiscaleCell, MultiscaleConfig
from deq_lm.regularizers import jacobian_frobenius, jacobian_penalty
from deq_lm.solvers import Broyden, Picard, StoppingRule, solve

WIDTHS = (8, 4, 6)
CONFIG = MultiscaleConfig(
    d_model=8,
    num_heads=2,
    d_inner=12,
    mem_len=20,
    init_std=0.2,
    coarse=(
        CoarseRate(ratio=2, d_model=4, num_heads=2, d_inner=6),
        CoarseRate(ratio=3, d_model=6, num_heads=1, d_inner=6),
    ),
)
TIGHT = StoppingRule(max_steps=200, rtol=1e-13, patience=None)
SOLVE = partial(solve, solver=Picard(), stopping=TIGHT)


def make(**changes) -> MultiscaleCell:
    torch.manual_seed(0)
    cell = MultiscaleCell(replace(CONFIG, **changes)).double().eval()
    with torch.no_grad():  # strong injection: a contraction
        for linear in cell.down:
            linear.weight *= 4.0
    return cell


def inputs(length: int, *, batch: int = 2, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 4 * torch.randn(batch, length, CONFIG.d_model, dtype=torch.float64, generator=generator)


def random_state(cell: MultiscaleCell, x: Tensor) -> Tensor:
    z = cell.as_state(x)
    return torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def solved(cell: MultiscaleCell, x: Tensor, memory: Memory | None = None, key_mask: Tensor | None = None) -> Tensor:
    solution = SOLVE(cell.bind(x, memory, key_mask), torch.zeros_like(cell.as_state(x)))
    assert solution.converged.all()
    return solution.image


def jacobian(cell: MultiscaleCell, x: Tensor, memory: Memory | None = None) -> Tensor:
    """df/dz of one sequence, (L, D, L, D)."""
    f = cell.bind(x, memory)
    f = f.with_inputs([tensor.detach() for tensor in f.inputs])
    full = torch.autograd.functional.jacobian(f, random_state(cell, x))
    assert isinstance(full, Tensor)
    return full[0, :, :, 0]


def reads(full: Tensor) -> dict[tuple[int, int], Tensor]:
    """By rate and rate, (L, L) bool: whether f of the first at one position reads z of the second at another."""
    by_rate = [part.split(WIDTHS, dim=3) for part in full.split(WIDTHS, dim=1)]
    return {(r, s): part.abs().amax(dim=(1, 3)) > 0 for r, row in enumerate(by_rate) for s, part in enumerate(row)}


@pytest.mark.parametrize("past", [0, 1, 3, 5, 6, 7])
def test_an_element_reads_its_own_tokens_and_earlier_ones_and_is_read_by_later_tokens_until_the_next_ends(past: int):
    cell, length = make(), 14
    x = inputs(length, batch=1)
    memory = Memory(cell.as_state(inputs(past, batch=1)), inputs(past, batch=1)) if past else None
    found = reads(jacobian(cell, x, memory))
    chunk_length = (1, 2, 6)
    number = torch.arange(past, past + length)
    ends = [(number + 1) % size == 0 for size in chunk_length]
    row, column = number[:, None], number[None, :]
    for rate in range(3):
        assert torch.equal(found[rate, rate], ends[rate][:, None] & ends[rate] & (column <= row))
    for fine, coarse in pairwise(range(3)):
        size = chunk_length[coarse]
        of_its_chunk = ends[coarse][:, None] & ends[fine] & (column // size == row // size)
        assert torch.equal(found[coarse, fine], of_its_chunk)
        newest_before = ends[fine][:, None] & ends[coarse] & (column // size == row // size - 1)
        assert torch.equal(found[fine, coarse], newest_before)
    assert not found[0, 2].any()
    assert not found[2, 0].any()


def test_an_element_has_a_say_in_a_different_way_at_every_place_of_the_chunk_that_holds_it():
    part = jacobian(make(), inputs(6, batch=1))[:, :8, 1, 8:12]  # f of tokens by the first chunk, whose last token is 1
    assert torch.dist(part[2], part[3]) > 0.5 * part[2].norm()
    assert not part[4].any()


def test_the_eigenvalues_are_those_of_each_element_alone():
    full = jacobian(make(), inputs(7, batch=1))
    everything = torch.linalg.eigvals(full.flatten(2).flatten(0, 1))
    alone = [
        torch.linalg.eigvals(part)
        for t in range(7)
        for part in (full[t, a:b, t, a:b] for a, b in pairwise((0, 8, 12, 18)))
    ]

    def sorted_(values: Tensor) -> Tensor:
        return values[values.abs() > 1e-6].abs().sort().values

    torch.testing.assert_close(sorted_(everything), sorted_(torch.cat(alone)), rtol=0, atol=1e-7)
    assert full.flatten(2).flatten(0, 1).norm() > torch.cat(alone).abs().norm()  # there is more than that


@pytest.mark.parametrize("cuts", [[1] * 20, [5, 2, 1, 12], [6, 6, 8], [13, 7]], ids=str)
def test_a_text_has_one_equilibrium_at_every_rate_however_it_is_cut(cuts: list[int]):
    cell, x = make(), inputs(20)
    whole = solved(cell, x)
    assert torch.equal(whole[..., 8:12].any(dim=2), ((torch.arange(20) + 1) % 2 == 0).expand(2, -1))
    assert torch.equal(whole[..., 12:].any(dim=2), ((torch.arange(20) + 1) % 6 == 0).expand(2, -1))
    memory, parts = None, []
    for piece in x.split(cuts, dim=1):
        parts.append(solved(cell, piece, memory))
        memory = cell.remember(cell.bind(piece, memory), parts[-1], piece, memory)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-11)


def test_chunks_are_counted_from_the_start_of_the_text_when_memory_has_forgotten_it():
    cell, x = make(mem_len=6), inputs(40)
    memory = None
    for piece in x.split([7, 5, 11, 10, 7], dim=1):
        start = 0 if memory is None else int(memory.num_tokens[0])
        z = solved(cell, piece, memory)
        memory = cell.remember(cell.bind(piece, memory), z, piece, memory)
        ends = (torch.arange(start, start + piece.shape[1]) + 1) % 6 == 0
        assert torch.equal(z[..., 12:].any(dim=2), ends.expand(2, -1))
        assert memory.length == 6 or start == 0
    assert memory.num_tokens.tolist() == [40, 40]


def test_padding_of_any_length_belongs_to_no_chunk():
    cell, x = make(), inputs(13, batch=4)
    for num_pads, own in zip((0, 1, 3, 4), x, strict=True):
        alone = solved(cell, own[None])
        pads = inputs(num_pads, batch=1, seed=3)
        mask = torch.tensor([[False] * num_pads + [True] * 13])
        found = solved(cell, torch.cat([pads, own[None]], dim=1), key_mask=mask)
        torch.testing.assert_close(found[:, num_pads:], alone, rtol=0, atol=1e-12)


def test_sequences_of_a_batch_have_chunks_of_their_own():
    cell, x = make(), inputs(13, batch=3)
    mask = torch.ones(3, 13, dtype=torch.bool)
    mask[0, :2], mask[1, 5], mask[2, 9:] = False, False, False  # in front, within, behind
    together = solved(cell, x, key_mask=mask)
    then = inputs(8, batch=3, seed=5)
    memory = cell.remember(cell.bind(x, key_mask=mask), together, x, None).mark_padding(mask)
    after = solved(cell, then, memory)
    for i in range(3):
        text = torch.cat([x[i, mask[i]], then[i]])[None]
        alone = solved(cell, text)[0]
        if i != 1:  # distances count padding between two tokens
            torch.testing.assert_close(together[i, mask[i]], alone[:-8], rtol=0, atol=1e-12)
        for rate, size in ((slice(8, 12), 2), (slice(12, 18), 6)):
            ends = (torch.arange(len(alone)) + 1) % size == 0
            found = torch.cat([together[i, mask[i]], after[i]])[:, rate].any(dim=1)
            assert torch.equal(found, ends)
    torch.testing.assert_close(
        after[0], solved(cell, torch.cat([x[:1, 2:], then[:1]], dim=1))[0, -8:], rtol=0, atol=1e-11
    )


@pytest.mark.parametrize("kept", [False, True], ids=["memory", "cache"])
def test_a_text_of_a_batch_may_begin_after_the_memory_of_the_others(kept: bool):
    """The last one: what is taken of its memory by mistake would be beyond the batch's end."""
    cell, x, then = make(), inputs(6, batch=2), inputs(7, batch=2, seed=5)
    mask = torch.tensor([[True], [False]]).expand(2, 6)
    first = solved(cell, x, key_mask=mask)
    f = cell.bind(x, key_mask=mask, sliding=kept)
    past = (cell.keep if kept else cell.remember)(f, first, x, None).mark_padding(mask)
    with torch.no_grad():
        after = SOLVE(cell.bind(then, past, sliding=kept), torch.zeros_like(cell.as_state(then))).image
    torch.testing.assert_close(after[1:], solved(cell, then[1:]), rtol=0, atol=1e-11)
    torch.testing.assert_close(after[:1], solved(cell, torch.cat([x, then], dim=1)[:1])[:, 6:], rtol=0, atol=1e-11)


@pytest.mark.parametrize("window", [1, 3])
def test_chunks_see_farther_than_the_window_of_the_tokens(window: int):
    cell = make(attention_window=window)
    memory = Memory(random_state(cell, inputs(8, batch=1)), inputs(8, batch=1, seed=5))
    found = reads(jacobian(cell, inputs(12, batch=1), memory))
    distance = torch.arange(12)[:, None] - torch.arange(12)
    assert torch.equal(found[0, 0], (distance >= 0) & (distance < window))
    assert found[1, 1][11, 1]
    with torch.no_grad():  # what is in memory before the window changes no token at once, and chunks do
        z = random_state(cell, inputs(12, batch=1))
        other = Memory(torch.cat([memory.z[:, :6] + 1, memory.z[:, 6:]], dim=1), memory.x)
        change = (cell.bind(inputs(12, batch=1), memory)(z) - cell.bind(inputs(12, batch=1), other)(z)).abs()[0]
    assert not change[:, :8].any()
    assert (change[:, 8:12].amax(dim=1) > 0).tolist() == [False, True] * 6


def test_every_adjoint_gradient_is_that_of_the_unrolled_solve():
    cell, x = make(), inputs(13)
    memory = Memory(random_state(cell, inputs(7)), inputs(7, seed=5))
    gradients = []
    for adjoint in (Unrolled(), Implicit(stopping=TIGHT), Implicit(solver=Broyden(), stopping=TIGHT)):
        f = cell.bind(x, memory)
        output, _ = adjoint.apply(f, torch.zeros_like(cell.as_state(x)), SOLVE)
        read = cell.read_out(output)
        cotangent = torch.randn(read.shape, dtype=read.dtype, generator=torch.Generator().manual_seed(1))
        gradients.append(torch.autograd.grad(read, list(cell.parameters()), cotangent))
    for found in gradients[1:]:
        for one, wanted in zip(found, gradients[0], strict=True):
            assert wanted.norm() > 0
            assert torch.dist(one, wanted) <= 1e-6 * wanted.norm()


def test_gradcheck_of_the_whole_solve_with_its_adjoint():
    cell, x = make(coarse=CONFIG.coarse[:1]), inputs(7, batch=1)
    f = cell.bind(x, Memory(random_state(cell, inputs(3, batch=1)), inputs(3, batch=1, seed=5)))
    tensors = [tensor.detach().requires_grad_() for tensor in f.inputs]

    def output(*tensors: Tensor) -> Tensor:
        return Implicit(stopping=TIGHT).apply(f.with_inputs(tensors), torch.zeros_like(cell.as_state(x)), SOLVE)[0]

    assert torch.autograd.gradcheck(output, tensors, eps=1e-6, atol=1e-6, fast_mode=True)


def test_the_jacobian_penalty_of_sequences_with_chunks_of_their_own_is_the_mean_over_them():
    cell, x = make(), inputs(9, batch=4)
    mask = torch.arange(9) >= torch.tensor([[0], [3], [1], [2]])
    f, z = cell.bind(x, key_mask=mask), random_state(cell, x)
    values, gradients = [], []
    for whole in (True, False):
        torch.manual_seed(3)
        if whole:
            value = jacobian_penalty(f, z)
        else:
            value = sum(jacobian_frobenius(f.select(slice(i, i + 1)), z[i : i + 1]) for i in range(4)) / 4
        values.append(value)
        gradients.append(torch.autograd.grad(value, list(cell.parameters()), allow_unused=True, retain_graph=True))
    torch.testing.assert_close(*values, rtol=1e-12, atol=0)
    for found, wanted in zip(*gradients, strict=True):
        if wanted is not None:
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_a_dropout_mask_is_one_a_solve_at_every_rate():
    cell, x = make(dropout=0.5).train(), inputs(12)
    f, z = cell.bind(x), random_state(cell, x)
    assert torch.equal(f(z), f(z))
    other = cell.bind(x)(z)
    for rate in (slice(0, 8), slice(8, 12), slice(12, 18)):
        assert not torch.equal(f(z)[..., rate], other[..., rate])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coarse": ()}, r"coarse=\(\): expected one rate or more.*transformer_xl"),
        ({"mem_len": 5}, "mem_len=5 with chunks of 6 tokens: expected memory of a chunk or more"),
        ({"injection": "attention"}, "injection='attention': expected 'residual'"),
        ({"norm": "none"}, "norm='none'"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"ratio": 1}, "ratio=1: expected 2 or more"), ({"d_model": 6}, "d_model=6 is not divisible by num_heads=4")],
)
def test_a_rate_that_cannot_be_meant_is_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        CoarseRate(**changes)
