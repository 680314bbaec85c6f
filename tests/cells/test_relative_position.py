"""Distances as sinusoids, and scores by distance read as scores by key."""

from __future__ import annotations

import torch

from deq_lm.cells.relative_position import by_key, sinusoids


def test_scores_by_distance_are_read_as_scores_by_key():
    length, num_keys = 3, 5
    distance_of_column = torch.arange(num_keys, -1, -1).sub(1).float().expand(length, num_keys + 1)
    found = by_key(distance_of_column)
    for i in range(length):
        for j in range(i + num_keys - length + 1):
            assert found[i, j] == i + num_keys - length - j


def test_sinusoids_are_exact_in_low_precision_too():
    exact = sinusoids(300, 16, torch.zeros((), dtype=torch.float64))
    half = sinusoids(300, 16, torch.zeros((), dtype=torch.bfloat16))
    torch.testing.assert_close(half.double(), exact, rtol=0, atol=4e-3)
