"""Chunks of a text, and chunks of chunks: which elements make one, where it stands, and who may read it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from deq_lm.cells.memory import Past

NOTHING = -1
"""In an index: there is no such element, and what is taken is zero."""


@dataclass(frozen=True)
class Timeline:
    """The elements of one rate in order of time: M slots for those in memory, N for those of the segment.

    A chunk ends where its last token is, and belongs to memory or segment as that token does. Where sequences have unequal
    numbers of chunks, the slots that one has too many are the first of memory and the last of the segment.

    Attributes:
        position: where an element ends, in memory and segment together, (B, M + N) int64; NOTHING in slots left over, so
            that nobody takes a row that is not there.
        present: False for padding and for slots left over, (B, M + N) bool.
        num_past: M.
        first: of those present, the first one's number in the whole text, which begins with 0: (B,) int64.
    """

    position: Tensor
    present: Tensor
    num_past: int
    first: Tensor


@dataclass(frozen=True)
class Chunks:
    """How one rate is made of the next finer one, k elements a chunk, and read by it.

    All are indices for `take`, as are those of `chunk_ends` and `slots`. A chunk may begin in memory and end in the
    segment, and an element may read a chunk of either: hence two indices of each kind, of which one is NOTHING wherever the
    other names something.

    Attributes:
        past_members, members: (B, N_coarse, k): the k finer elements that make each of the segment's chunks.
        past_held, held: (B, N_fine): what a finer element of the segment reads, which is the newest chunk that was complete
            before it, by the matrix for its own place in its own chunk: chunk k + place. `past_held` is the place alone,
            since only memory's newest chunk is ever read.
    """

    past_members: Tensor
    members: Tensor
    past_held: Tensor
    held: Tensor


def tokens(x: Tensor, memory: Past | None, key_mask: Tensor | None) -> Timeline:
    """The finest rate: every position is an element, unless it is padding."""
    (batch, length), num_past = x.shape[:2], 0 if memory is None else memory.length
    masks = [
        x.new_ones(batch, num, dtype=torch.bool) if mask is None else mask
        for mask, num in ((memory and memory.mask, num_past), (key_mask, length))
    ]
    first = masks[0].new_zeros(batch, dtype=torch.int64) if memory is None else memory.count() - masks[0].sum(dim=1)
    position = torch.arange(num_past + length, device=x.device).expand(batch, -1)
    return Timeline(position, torch.cat(masks, dim=1), num_past, first)


def coarsen(fine: Timeline, ratio: int) -> tuple[Timeline, Chunks]:
    """Chunk q of the text is its elements q k, ..., q k + k - 1, however it is cut into segments; k = `ratio`.

    The host waits for the device, once, to learn how many slots are needed.
    """
    num_past, size = fine.num_past, fine.present.shape[1]
    by_rank = torch.argsort((~fine.present).to(torch.uint8), dim=1, stable=True)  # those present, in order, come first
    in_past = fine.first + fine.present[:, :num_past].sum(dim=1)  # number of the first element of the segment
    end = fine.first + fine.present.sum(dim=1)
    earliest, new, after = (number // ratio for number in (fine.first, in_past, end))  # chunks complete by then
    most_past, most_new = torch.stack([(new - earliest).amax(), (after - new).amax()]).tolist()
    chunk = new[:, None] + torch.arange(-most_past, most_new, device=new.device)  # (B, M + N), numbers in the text
    present = (chunk >= earliest[:, None]) & (chunk < after[:, None])

    rank = chunk[:, :, None] * ratio + torch.arange(ratio, device=new.device) - fine.first[:, None, None]
    member = by_rank.gather(1, rank.clamp(0, size - 1).flatten(1)).view_as(rank)  # (B, M + N, k)
    position = torch.where(present, fine.position.gather(1, member[:, :, -1]), NOTHING)
    known = (present[:, :, None] & (rank >= 0))[:, most_past:]
    member = member[:, most_past:]
    is_past = member < num_past

    fine_new = fine.present[:, num_past:]
    number = in_past[:, None] + fine_new.cumsum(dim=1) - 1  # (B, N_fine)
    newest = number // ratio - 1 - new[:, None]  # of the segment's chunks; -1 is memory's last one
    place = number % ratio
    is_there = fine_new & (newest == -1) & (new > earliest)[:, None]
    return Timeline(position, present, most_past, earliest), Chunks(
        past_members=torch.where(known & is_past, member, NOTHING),
        members=torch.where(known & ~is_past, member - num_past, NOTHING),
        past_held=torch.where(is_there, place, NOTHING),
        held=torch.where(fine_new & (newest >= 0), newest * ratio + place, NOTHING),
    )


def chunk_ends(timeline: Timeline, past_length: int) -> Tensor:
    """The position in the segment where each of its elements ends, (B, N), if memory has so many positions."""
    new = slice(timeline.num_past, None)
    return torch.where(timeline.present[:, new], timeline.position[:, new] - past_length, NOTHING)


def slots(ends: Tensor, length: int) -> Tensor:
    """The inverse of `chunk_ends`: the element that ends at each of the segment's positions, (B, L)."""
    slot = torch.arange(ends.shape[1], device=ends.device).expand_as(ends)
    empty = torch.full((len(ends), 1 + length), NOTHING, device=ends.device)  # in front, for what ends nowhere
    return empty.scatter(1, ends - NOTHING, slot)[:, 1:]


def take(values: Tensor, index: Tensor) -> Tensor:
    """Of (B, N, W) the rows that `index`, (B, ...), names, and zeros for NOTHING: (B, ..., W)."""
    batch, num, width = values.shape
    padded = F.pad(values, (0, 0, 1, 0)).flatten(0, 1)  # NOTHING is the row before the first
    row = index.flatten(1) + 1 + (num + 1) * torch.arange(batch, device=index.device)[:, None]
    return padded.index_select(0, row.flatten()).view(*index.shape, width)
