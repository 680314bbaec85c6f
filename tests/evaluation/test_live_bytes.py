"""Bytes of live tensors by what they are for, counted by hand."""

from __future__ import annotations

import operator
from _thread import start_new_thread
from functools import partial
from threading import Event

import pytest
import torch

from deq_lm.evaluation.live_bytes import LiveBytes
from deq_lm.solvers import Broyden, StoppingRule, solve


def test_tensors_of_before_do_not_count_and_freed_ones_no_longer():
    before = torch.zeros(1000)
    with torch.no_grad(), LiveBytes() as meter:
        view = before.view(10, 100)
        first = view + 1  # 4000 bytes
        del first
        second = torch.zeros(500, dtype=torch.float64)  # 4000 bytes
        third = second[:10].clone()  # 80 bytes
    assert meter.peak == 4080
    assert dict(meter.parts_at_peak) == {"rest": 4080}
    del second, third


def test_what_a_solver_makes_is_the_solvers_and_what_f_makes_is_not():
    weight, start = 0.1 * torch.eye(8), torch.zeros(2, 4, 8)
    with LiveBytes() as meter:
        solve(
            lambda z: torch.tanh(z @ weight + 1.0),
            start,
            solver=Broyden(history_size=3),
            stopping=StoppingRule.fixed(5),
        )
    state = 2 * 4 * 8 * 4
    assert 2 * 3 * state <= meter.most["solver"] <= 30 * state  # pairs of vectors, three at most, and some states
    assert meter.most["rest"] <= 4 * state  # of f: product, sum, tanh
    assert meter.most["activations"] == 0


def test_a_marked_tensor_moves_and_is_freed_from_where_it_moved():
    with torch.no_grad(), LiveBytes() as meter:
        gradient = torch.zeros(100)
        meter.mark(gradient, "gradients")
        other = torch.zeros(50)
        del gradient
        last = torch.zeros(25)
    assert meter.peak == 600
    assert dict(meter.parts_at_peak) == {"rest": 200, "gradients": 400}
    assert meter._live["gradients"] == 0
    del other, last


def test_a_limit_is_out_of_memory():
    with (
        pytest.raises(torch.OutOfMemoryError, match="4,000 bytes of tensors are alive; the limit is 3,999"),
        LiveBytes(limit_bytes=3999),
    ):
        torch.zeros(1000)


def test_an_operation_in_a_thread_without_functions_counts_by_whether_it_is_recorded():
    """There autograd runs the operations of a backward pass on a GPU."""
    meter, results, done = LiveBytes(), [], Event()
    operation = partial(meter.__torch_dispatch__, torch.ops.aten.zeros.default, (), ([100],))
    calls = [operation, partial(torch._C._set_grad_enabled, False), operation, operation, done.set]
    start_new_thread(results.extend, (map(operator.call, calls),))  # nothing of it is written in Python
    assert done.wait(timeout=10)
    assert dict(meter.most) == {"activations": 400, "rest": 800}
