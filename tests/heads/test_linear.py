"""The chunked loss against the dense one, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from deq_lm.heads import token_nll
from deq_lm.heads.linear import MAX_LOGITS


@pytest.mark.parametrize("chunk_positions", [1, 4, 7, 100])
def test_chunks_change_neither_the_sum_nor_its_gradients(chunk_positions: int):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 7, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    targets = torch.randint(11, (2, 7), generator=generator)
    targets[0, -2:] = -100
    dense = -F.linear(hidden, weight).log_softmax(-1)
    expected = dense.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)[targets != -100].sum()
    found, count = token_nll(hidden, weight, targets, chunk_positions=chunk_positions)
    assert count == 12
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for a, b in zip(
        torch.autograd.grad(found, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_logits_of_all_positions_are_never_kept():
    hidden, weight = torch.randn(4, 64, 8, requires_grad=True), torch.randn(500, 8, requires_grad=True)
    targets = torch.randint(500, (4, 64))
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
        token_nll(hidden, weight, targets, chunk_positions=16)
    assert max(sizes) < 500 * 64


def test_a_large_vocabulary_is_chunked_without_being_asked():
    vocab_size = MAX_LOGITS // 8
    hidden = torch.randn(1, 9, 2, requires_grad=True)
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
        total, _ = token_nll(hidden, torch.zeros(vocab_size, 2), torch.zeros(1, 9, dtype=torch.long))
    assert total.item() == pytest.approx(9 * math.log(vocab_size), rel=1e-5)
    assert max(sizes) <= 2 * vocab_size  # the weight, and no logits


def test_chunks_of_nothing_are_refused():
    with pytest.raises(ValueError, match=r"chunk_positions=0\): expected 1 or more"):
        token_nll(torch.zeros(1, 2, 4), torch.zeros(5, 4), torch.zeros(1, 2, dtype=torch.long), chunk_positions=0)


def test_half_precision_logits_are_summed_in_float32():
    hidden, weight = torch.randn(2, 3, 8, dtype=torch.bfloat16), torch.randn(50, 8, dtype=torch.bfloat16)
    total, _ = token_nll(hidden, weight, torch.zeros(2, 3, dtype=torch.long))
    assert total.dtype == torch.float32


def test_no_scored_target_is_zero_nats_and_not_nan():
    total, count = token_nll(torch.randn(1, 2, 4), torch.randn(5, 4), torch.full((1, 2), -100))
    assert (total.item(), count.item()) == (0.0, 0)
