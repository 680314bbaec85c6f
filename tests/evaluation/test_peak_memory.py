"""The memory meters, on steps whose bytes can be counted by hand, and on the model they are for."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from deq_lm.evaluation.peak_memory import memory_against_depth, peak_live_bytes, saved_bytes


def test_saved_bytes_by_hand():
    weight = torch.randn(10, 100, dtype=torch.float64, requires_grad=True)
    x = torch.randn(7, 10, dtype=torch.float64)

    def forward() -> torch.Tensor:
        hidden = torch.tanh(x @ weight)  # saves x, and its own output (7, 100)
        return (hidden.exp() * hidden).sum()  # saves exp (7, 100), and hidden again

    assert saved_bytes(forward, besides=[x, weight]) == 2 * 7 * 100 * 8
    assert saved_bytes(forward) == 2 * 7 * 100 * 8 + 7 * 10 * 8


def test_a_storage_counts_once_and_whole_however_many_views_of_it_are_saved():
    scale = torch.ones(3, requires_grad=True)
    x = torch.randn(5, 3)

    def forward() -> None:
        _ = x[:2] * scale, x[2:] * scale, x.T.T * scale

    assert saved_bytes(forward) == 5 * 3 * 4
    assert saved_bytes(forward, besides=[x[0]]) == 0


def test_what_a_backward_pass_records_counts_as_well():
    class InBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, *grads):
            with torch.enable_grad():
                inner = torch.ones(1000, requires_grad=True)
                inner.exp()  # saves its output
            return grads[0]

    x = torch.ones(2, requires_grad=True)
    assert saved_bytes(lambda: InBackward.apply(x)) == 0
    assert saved_bytes(lambda: InBackward.apply(x).sum().backward()) == 1000 * 4


def test_the_gradient_under_the_meter_is_the_right_one():
    x = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    found = []
    saved_bytes(lambda: found.append(torch.autograd.grad(x.exp().tanh().square().sum(), x)[0]))
    y = x.detach().exp()
    torch.testing.assert_close(found[0], 2 * y.tanh() * (1 - y.tanh().square()) * y)


def test_the_meter_keeps_no_graph_alive():
    x = torch.ones(5, requires_grad=True)
    graphs = []

    def forward() -> None:
        output = x.exp()  # its node saves its own output
        graphs.append(weakref.ref(output.untyped_storage()))

    gc.disable()
    try:
        saved_bytes(forward)
        assert graphs[0]() is None
    finally:
        gc.enable()


def test_peak_live_bytes_by_hand():
    x = torch.zeros(1000)  # there before

    def run() -> None:
        a = x * 2  # 4000
        b = a + 1  # 8000
        del a  # 4000
        view = b.view(10, 100).T  # nothing new
        c = view * 2  # 8000
        joined = torch.cat([c, c])  # 16000
        del joined, c, view, b
        _ = x + 1  # 4000

    assert peak_live_bytes(run) == 16000
    assert peak_live_bytes(lambda: x.view(10, 100).mT) == 0


def test_peak_live_bytes_sees_the_backward_pass():
    x = torch.ones(1000, requires_grad=True)

    def step() -> None:
        torch.autograd.grad((x * x).sum(), x)

    # x * x is gone when the backward pass comes to two products and their sum
    assert 3 * 4000 <= peak_live_bytes(step) < 3 * 4000 + 64


@pytest.mark.parametrize("mem_len", [0, 6])
def test_the_memory_of_an_equilibrium_does_not_grow_with_depth_and_that_of_the_unrolled_model_does(deq_model, mem_len):
    model = deq_model(cell={"mem_len": mem_len})
    ids = torch.arange(16).reshape(2, 8)
    with torch.no_grad():
        memory = model(ids).memory
    rows = memory_against_depth(model, ids, (4, 8, 32), memory=memory)
    assert [row.depth for row in rows] == [4, 8, 32]
    assert rows[0].equilibrium_bytes == rows[2].equilibrium_bytes > 0
    per_layer = (rows[1].unrolled_bytes - rows[0].unrolled_bytes) / 4
    assert rows[2].unrolled_bytes == rows[1].unrolled_bytes + 24 * per_layer
    assert rows[2].unrolled_bytes > 5 * rows[2].equilibrium_bytes
    assert rows[2].unrolled_peak_bytes > 2 * rows[1].unrolled_peak_bytes
    assert rows[2].equilibrium_peak_bytes < rows[2].unrolled_peak_bytes / 2


def test_the_equilibrium_of_the_table_saves_about_what_one_layer_does(deq_model):
    model = deq_model()
    (row,) = memory_against_depth(model, torch.arange(16).reshape(2, 8), (1,))
    assert row.unrolled_bytes <= row.equilibrium_bytes <= 2 * row.unrolled_bytes


def test_measuring_memory_leaves_mode_gradients_and_random_state_as_they_were(deq_model):
    model = deq_model(cell={"dropout": 0.2}).eval()
    before = torch.get_rng_state()
    memory_against_depth(model, torch.arange(8)[None], (2,))
    assert not any(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), before)
