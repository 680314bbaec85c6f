"""ContiguousStreams: one token array read as B parallel streams, segment after segment, with a state to resume from.

A model with memory needs that row b of a segment continues row b of the segment before. So each stream is a contiguous
stretch of the text, and a process owns whole streams.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deq_lm.errors import ConfigError, DataError

IGNORED = -100


@dataclass(frozen=True)
class Segment:
    """The next L tokens of b streams.

    Attributes:
        input_ids: (b, L) int64.
        targets: (b, L) int64, the token after each input; -100 where a stream has ended (evaluation only).
        is_start: whether the streams start here, so that memory of what came before must be dropped.
        first_targets: which target of the text the first of each stream is, b numbers; the others follow it.
    """

    input_ids: Tensor
    targets: Tensor
    is_start: bool
    first_targets: tuple[int, ...]


class ContiguousStreams:
    """Streams over `tokens`, of which tokens[0] is context and all others are targets, once an epoch each.

    With `drop_remainder` (training) all streams have the same whole number of segments; what is left over, fewer than
    num_streams * segment_length targets, is dropped at the end of the array. Without (evaluation), every target is
    covered: lengths differ by one at most, and what is beyond the end of a stream is padding.

    Args:
        tokens: 1-D, any integer type, a memory map for example.
        num_streams: over all ranks; a multiple of `num_ranks`.
        segment_length: targets of one stream in one segment.
        drop_remainder: see above.
        rank: of this process, whose streams are rank * b up to (rank + 1) * b with b = num_streams / num_ranks.
        num_ranks: number of processes.

    Raises:
        ConfigError: a number is out of range, or `num_streams` cannot be shared out evenly.
        DataError: too few tokens for one segment of every stream (training), or no target at all.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        *,
        num_streams: int,
        segment_length: int,
        drop_remainder: bool,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        for name, value in (("num_streams", num_streams), ("segment_length", segment_length), ("num_ranks", num_ranks)):
            if value < 1:
                raise ConfigError(f"{name}={value}: expected at least 1.")
        if not 0 <= rank < num_ranks:
            raise ConfigError(f"rank={rank}: expected 0 to {num_ranks - 1}, below num_ranks={num_ranks}.")
        if num_streams % num_ranks:
            raise ConfigError(
                f"num_streams={num_streams} cannot be shared out evenly among {num_ranks} processes, each of which owns "
                f"whole streams. Make it a multiple of {num_ranks}."
            )
        num_targets = max(len(tokens) - 1, 0)
        per_segment = num_streams * segment_length
        if drop_remainder and num_targets < per_segment:
            raise DataError(
                f"the text has {num_targets} tokens, fewer than one segment of {num_streams} streams x {segment_length} "
                "tokens. Lower the number of streams or the segment length, or give more text."
            )
        if num_targets == 0:
            raise DataError("the text has no tokens. Give more text.")

        if drop_remainder:
            self._num_segments = num_targets // per_segment
            lengths = np.full(num_streams, self._num_segments * segment_length)
        else:
            self._num_segments = -(-num_targets // per_segment)
            lengths = num_targets // num_streams + (np.arange(num_streams) < num_targets % num_streams)
        ends = np.cumsum(lengths)  # the last target of stream b is tokens[ends[b]]
        own = slice(rank * num_streams // num_ranks, (rank + 1) * num_streams // num_ranks)
        self._bounds = list(zip((ends - lengths)[own].tolist(), ends[own].tolist(), strict=True))
        self._tokens = tokens
        self._segment_length = segment_length
        self._epoch = 0
        self._segment = 0

    def __len__(self) -> int:
        """Segments in an epoch, the same on every rank."""
        return self._num_segments

    def __iter__(self) -> Iterator[Segment]:
        """The segments from where the streams stand to the end of the epoch."""
        epoch = self._epoch
        while self._epoch == epoch:
            yield self.next_segment()

    def next_segment(self) -> Segment:
        """The segment the streams stand at; after the last of an epoch they stand at the first again."""
        offset, length = self._segment * self._segment_length, self._segment_length
        input_ids = torch.zeros(len(self._bounds), length, dtype=torch.int64)  # (b, L)
        targets = torch.full_like(input_ids, IGNORED)  # (b, L)
        first_targets = tuple(min(start + offset, end) for start, end in self._bounds)
        for row, (first, (_, end)) in enumerate(zip(first_targets, self._bounds, strict=True)):
            last = min(first + length, end)
            window = torch.from_numpy(self._tokens[first : last + 1].astype(np.int64))
            input_ids[row, : last - first] = window[:-1]
            targets[row, : last - first] = window[1:]
        segment = Segment(input_ids, targets, self._segment == 0, first_targets)
        self._segment += 1
        if self._segment == self._num_segments:
            self._epoch, self._segment = self._epoch + 1, 0
        return segment

    def state_dict(self) -> dict[str, int]:
        """Where the streams stand: {"epoch", "segment"}, the segment that `next_segment` gives next."""
        return {"epoch": self._epoch, "segment": self._segment}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Stand where `state_dict` said, of streams over the same tokens in the same shape.

        Raises:
            DataError: no such place in these streams.
        """
        epoch, segment = state.get("epoch"), state.get("segment")
        if not (isinstance(epoch, int) and isinstance(segment, int) and epoch >= 0 <= segment < self._num_segments):
            raise DataError(
                f"the state {dict(state)} is no place in streams of {self._num_segments} segments. Resume with the text, "
                "number of streams and segment length it was saved with."
            )
        self._epoch, self._segment = epoch, segment
