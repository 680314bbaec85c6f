"""Streams give back the text: all of it, once, in order, on every rank, from any place."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deq_lm.data.streams import IGNORED, ContiguousStreams
from deq_lm.errors import ConfigError, DataError


def tokens_of(num_targets: int) -> np.ndarray:
    return np.arange(num_targets + 1, dtype=np.uint16)


@given(st.integers(1, 200), st.integers(1, 4), st.integers(1, 3), st.integers(1, 20))
def test_evaluation_streams_cover_every_target_once_over_all_ranks(num_targets, per_rank, num_ranks, length):
    seen: list[int] = []
    for rank in range(num_ranks):
        streams = ContiguousStreams(
            tokens_of(num_targets),
            num_streams=per_rank * num_ranks,
            segment_length=length,
            drop_remainder=False,
            rank=rank,
            num_ranks=num_ranks,
        )
        segments = list(streams)
        assert len(segments) == len(streams)
        for row in range(per_rank):
            targets = torch.cat([segment.targets[row] for segment in segments])
            inputs = torch.cat([segment.input_ids[row] for segment in segments])
            scored = targets != IGNORED
            assert torch.equal(targets[scored], inputs[scored] + 1)
            seen += targets[scored].tolist()
    assert seen == list(range(1, num_targets + 1))


def test_training_streams_are_the_text_cut_into_equal_stretches_and_begin_again():
    streams = ContiguousStreams(tokens_of(50), num_streams=4, segment_length=3, drop_remainder=True)
    epoch = list(streams)
    assert [segment.is_start for segment in epoch] == [True, False, False, False]
    text = torch.cat([segment.targets for segment in epoch], dim=1)
    assert torch.equal(text, torch.arange(1, 49).view(4, 12))
    assert torch.equal(streams.next_segment().targets, epoch[0].targets)


@given(st.integers(0, 11))
def test_streams_resume_exactly_where_their_state_was_taken(steps):
    def make() -> ContiguousStreams:
        return ContiguousStreams(tokens_of(50), num_streams=2, segment_length=5, drop_remainder=True)

    first, second = make(), make()
    for _ in range(steps):
        first.next_segment()
    second.load_state_dict(first.state_dict())
    for _ in range(7):
        ours, theirs = first.next_segment(), second.next_segment()
        assert torch.equal(ours.input_ids, theirs.input_ids)
        assert ours.is_start == theirs.is_start


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_streams": 0}, ConfigError, "num_streams=0"),
        ({"rank": 2, "num_ranks": 2}, ConfigError, "rank=2"),
        ({"num_streams": 3, "num_ranks": 2}, ConfigError, "multiple of 2"),
        ({"segment_length": 30}, DataError, "fewer than one segment"),
    ],
)
def test_what_cannot_be_streamed_is_refused(options: dict, error: type, message: str):
    with pytest.raises(error, match=message):
        ContiguousStreams(tokens_of(50), **{"num_streams": 2, "segment_length": 5, "drop_remainder": True, **options})


@pytest.mark.parametrize("state", [{}, {"epoch": 0, "segment": 5}, {"epoch": -1, "segment": 0}])
def test_a_state_of_other_streams_is_refused(state: dict):
    streams = ContiguousStreams(tokens_of(50), num_streams=2, segment_length=5, drop_remainder=True)
    with pytest.raises(DataError, match="no place"):
        streams.load_state_dict(state)
