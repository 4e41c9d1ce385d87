"""What an encoder needs to know about the jagged sequences that it reads.

Letters: B sequences, L tokens, R rows of the result.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipelines.batch import SequenceBatch, TokenKind


@dataclass(frozen=True)
class Kept:
    """How much of a batch attention truncation keeps, known to the host."""

    history: int
    """Tokens of history, at most, of each sequence."""
    num_tokens: int
    """Of all sequences."""
    max_len: int
    """Of the longest."""


@dataclass(frozen=True)
class Group:
    """Events of history that one stack of a mixture reads (docs/ultra_hstu.md)."""

    least_codes: tuple[tuple[int, int], ...]
    """(column of action_codes, least code): an event with any of them belongs; empty: all do."""
    history: int
    """Events, at most, of each sequence: the newest that belong; 0 means all."""


@dataclass(frozen=True)
class Before:
    """What each sequence holds that is not among its tokens here, because it is cached.

    The tokens left out follow the context tokens, which are here.
    """

    num_tokens: Tensor
    """(B,) int64."""
    first_time: Tensor
    """(B,) int64 s: timestamp of the whole sequence's first token."""
    last_time: Tensor
    """(B,) int64 s: timestamp of the last token left out."""

    def of(self, sequences: Tensor) -> "Before":
        """Return what is left out of some sequences."""
        return Before(
            self.num_tokens[sequences], self.first_time[sequences], self.last_time[sequences]
        )

    def to(self, device: torch.device) -> "Before":
        """Return the same on a device."""
        return Before(
            self.num_tokens.to(device), self.first_time.to(device), self.last_time.to(device)
        )


@dataclass(frozen=True)
class SequenceInfo:
    """Structure of a jagged batch, without its contents.

    An encoder maps x_LD to y_RD, the rows of the last `tail_lengths[b]` tokens of each sequence:
    only they are read by a loss, so the last layer computes no others.
    """

    offsets: Tensor
    """(B + 1,) int64: tokens of sequence b are offsets[b]:offsets[b + 1]."""
    tail_offsets: Tensor
    """(B + 1,) int64: rows of the result of sequence b are tail_offsets[b]:tail_offsets[b + 1]."""
    max_len: int
    """Longest sequence."""
    max_tail_len: int
    """Longest tail."""
    timestamp: Tensor
    """(L,) int64 s."""
    query_time: Tensor
    """(L,) int64 s: when the prediction read at the token is made."""
    session_start: Tensor
    """(B,) int64: index within the sequence of the first token of the session; below 0 where
    `before` leaves that out."""
    num_context: int
    """Context tokens at the head of every sequence."""
    num_candidates: Tensor
    """(B,) int64: candidates at the end, which see history and themselves only and share a
    position."""
    num_rows: int
    """R, known to the host, so that no device has to be waited for."""
    kept: Kept | None = None
    """With attention truncation: what `truncate` will keep."""
    groups: tuple["GroupInfo", ...] = ()
    """With a mixture: what each of its stacks reads."""
    before: Before | None = None
    """Of a part of each sequence (gr/inference): positions count what it leaves out."""
    places: Tensor | None = None
    """(L,) int64: `token_places` of the tokens, where they are known; None: they are computed."""

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that what is not the batch's own is used on `stream`."""
        self.tail_offsets.record_stream(stream)
        for group in self.groups:
            info = group.info
            own = (group.tokens, info.offsets, info.session_start, info.timestamp, info.query_time)
            for x in own:
                x.record_stream(stream)


@dataclass(frozen=True)
class GroupInfo:
    """The part of a batch that one stack reads."""

    tokens: Tensor
    """(T,) int64 ascending, of the batch."""
    info: SequenceInfo
    """Structure of the sequences that they make; tails are those of the batch."""


def sequence_info(
    batch: SequenceBatch, *, keep_history: int = 0, groups: Sequence[Group] = ()
) -> SequenceInfo:
    """Return the structure of `batch`, its tails cut at the first position that a loss reads.

    Args:
        batch: in host memory, or its device is waited for.
        keep_history: tokens of history that attention truncation will keep; 0: there is none.
        groups: of a mixture; empty: there is none.
    """
    lengths = batch.lengths
    sequence = sequence_index(batch.offsets, batch.num_tokens)
    tail = torch.zeros_like(lengths)
    for positions in (batch.ranking_positions, batch.retrieval_positions):
        owner = sequence[positions]
        tail.scatter_reduce_(0, owner, batch.offsets[owner + 1] - positions, "amax")
    tail_offsets = torch.zeros_like(batch.offsets)
    tail_offsets[1:] = tail.cumsum(0)
    info = SequenceInfo(
        offsets=batch.offsets,
        tail_offsets=tail_offsets,
        max_len=batch.max_len,
        max_tail_len=int(tail.max()) if tail.numel() else 0,
        timestamp=batch.timestamp,
        query_time=batch.query_time,
        session_start=batch.session_start,
        num_context=batch.num_context,
        num_candidates=batch.num_candidates,
        num_rows=int(tail_offsets[-1]),
        kept=what_is_kept(batch.lengths, batch.session_start, batch.num_context, keep_history),
    )
    chosen = tuple(_choose(batch, info, group, keep_history) for group in groups)
    return replace(info, groups=chosen)


def _choose(batch: SequenceBatch, info: SequenceInfo, group: Group, keep_history: int) -> GroupInfo:
    """Return what a group reads: context, session and tails whole, of other history its events."""
    kind, offsets = batch.token_kind, info.offsets
    sequence_L = sequence_index(offsets, batch.num_tokens)
    place_L = torch.arange(batch.num_tokens, device=kind.device) - offsets[sequence_L]
    is_history_L = (place_L < info.session_start[sequence_L]) & (kind != TokenKind.CONTEXT)

    token_A = ((kind == TokenKind.ACTION) | (kind == TokenKind.EVENT)).nonzero()[:, 0]
    belongs_A = is_history_L[token_A]
    if group.least_codes:
        columns, least = (list(x) for x in zip(*group.least_codes, strict=True))
        reached = batch.action_codes[:, columns] >= batch.action_codes.new_tensor(least)
        belongs_A = belongs_A & reached.any(1)
    belongs_L = torch.zeros_like(is_history_L)
    belongs_L[token_A[belongs_A]] = True
    if group.history:
        count_L1 = torch.nn.functional.pad(belongs_L.cumsum(0), (1, 0))
        newer_L = count_L1[offsets[sequence_L + 1]] - count_L1[1:]
        belongs_L &= newer_L < group.history
    # The item of an action stands in front of it.
    belongs_L[:-1] |= belongs_L[1:] & (kind[1:] == TokenKind.ACTION)

    tail_B = info.tail_offsets.diff()
    is_tail_L = place_L >= (batch.lengths - tail_B)[sequence_L]
    keep_L = belongs_L | ~is_history_L | is_tail_L
    kept_L1 = torch.nn.functional.pad(keep_L.cumsum(0), (1, 0))
    own_offsets = kept_L1[offsets]
    session_start = kept_L1[offsets[:-1] + info.session_start] - own_offsets[:-1]
    lengths = own_offsets.diff()
    index_T = keep_L.nonzero()[:, 0]
    return GroupInfo(
        index_T,
        replace(
            info,
            offsets=own_offsets,
            max_len=int(lengths.max()) if lengths.numel() else 0,
            timestamp=info.timestamp[index_T],
            query_time=info.query_time[index_T],
            session_start=session_start,
            kept=what_is_kept(lengths, session_start, info.num_context, keep_history),
        ),
    )


def what_is_kept(
    lengths: Tensor, session_start: Tensor, num_context: int, keep_history: int
) -> Kept | None:
    """Return how much is left if each sequence keeps so many tokens of history.

    Args:
        lengths: (B,) int64.
        session_start: (B,) int64.
        num_context: context tokens, which stay.
        keep_history: 0 means that there is no truncation: the result is None.
    """
    if not keep_history:
        return None
    kept_B = lengths - _dropped(session_start, num_context, keep_history)
    longest = int(kept_B.max()) if kept_B.numel() else 0
    return Kept(keep_history, int(kept_B.sum()), longest)


def truncate(info: SequenceInfo) -> tuple[Tensor, SequenceInfo]:
    """Keep context, session and the newest history of each sequence.

    What is kept is counted from the session's start and not from the sequence's end: otherwise an
    early position of the session would see more or less according to how many follow it.

    Args:
        info: with `kept`.

    Returns:
        (T,) int64, the tokens that stay, in order; the structure of the sequences that they make.
        Tails are as they were, since a loss reads none of what is dropped.

    Source: ULTRA-HSTU (arXiv 2602.16986), attention truncation.
    """
    assert info.kept is not None
    lengths = info.offsets.diff()
    dropped_B = _dropped(info.session_start, info.num_context, info.kept.history)
    offsets = torch.zeros_like(info.offsets)
    offsets[1:] = (lengths - dropped_B).cumsum(0)
    sequence_T = sequence_index(offsets, info.kept.num_tokens)
    place_T = torch.arange(info.kept.num_tokens, device=offsets.device) - offsets[sequence_T]
    skipped_T = dropped_B[sequence_T].where(place_T >= info.num_context, 0)
    index_T = info.offsets[sequence_T] + place_T + skipped_T
    return index_T, replace(
        info,
        offsets=offsets,
        max_len=info.kept.max_len,
        timestamp=info.timestamp[index_T],
        query_time=info.query_time[index_T],
        session_start=info.session_start - dropped_B,
        kept=None,
    )


def _dropped(session_start: Tensor, num_context: int, keep_history: int) -> Tensor:
    return (session_start - num_context - keep_history).clamp(min=0)


def info_of_copy(
    info: SequenceInfo, batch: SequenceBatch, copy: Callable[[Tensor], Tensor]
) -> SequenceInfo:
    """Return the structure of a batch's copy on a device, without waiting for the device.

    Args:
        info: `sequence_info` of the batch in host memory.
        batch: the copy.
        copy: copies a tensor of `info` likewise.
    """
    tail_offsets = copy(info.tail_offsets)

    def copy_group(group: GroupInfo) -> GroupInfo:
        index_T = copy(group.tokens)
        return GroupInfo(
            index_T,
            replace(
                group.info,
                offsets=copy(group.info.offsets),
                tail_offsets=tail_offsets,
                timestamp=batch.timestamp[index_T],
                query_time=batch.query_time[index_T],
                session_start=copy(group.info.session_start),
                num_candidates=batch.num_candidates,
            ),
        )

    return replace(
        info,
        offsets=batch.offsets,
        tail_offsets=tail_offsets,
        timestamp=batch.timestamp,
        query_time=batch.query_time,
        session_start=batch.session_start,
        num_candidates=batch.num_candidates,
        groups=tuple(copy_group(group) for group in info.groups),
    )


def token_places(info: SequenceInfo, sequence_L: Tensor) -> Tensor:
    """Return (L,) int64: the index of each token in its sequence; all candidates share the first's.

    Args:
        info: structure of the batch.
        sequence_L: int64, the sequence of each token; not read where places are known.
    """
    if info.places is not None:
        return info.places
    place_L = torch.arange(sequence_L.numel(), device=sequence_L.device)
    place_L = place_L - info.offsets[sequence_L]
    history_L = (info.offsets.diff() - info.num_candidates)[sequence_L]
    shared_L = torch.minimum(place_L, history_L)
    if info.before is None:
        return shared_L
    behind_L = info.before.num_tokens[sequence_L]
    return torch.where(shared_L < info.num_context, shared_L, shared_L + behind_L)


def sequence_index(offsets: Tensor, num_tokens: int) -> Tensor:
    """Return (L,) int64: the sequence that each token belongs to.

    Args:
        offsets: (B + 1,) int64.
        num_tokens: L, given so that no device has to be waited for.
    """
    return torch.repeat_interleave(
        torch.arange(offsets.numel() - 1, device=offsets.device),
        offsets.diff(),
        output_size=num_tokens,
    )


def tail_rows(info: SequenceInfo, positions: Tensor, sequence: Tensor) -> Tensor:
    """Return the rows of an encoder's result that belong to `positions`.

    Args:
        info: the structure given to the encoder.
        positions: (P,) int64, tokens 0 .. L-1, each inside the tail of its sequence.
        sequence: (P,) int64, the sequence of each position.
    """
    return positions - info.offsets[sequence + 1] + info.tail_offsets[sequence + 1]


def tail_if_shorter(info: SequenceInfo, x_LD: Tensor) -> Tensor | None:
    """Return `tail_index(info)`, or None where the tails are the whole sequences."""
    return None if info.num_rows == x_LD.shape[0] else tail_index(info)


def tail_index(info: SequenceInfo) -> Tensor:
    """Return (R,) int64: the tokens of the tails, in the order of the encoder's result."""
    tail_lengths_B = info.tail_offsets.diff()
    token_of_row_B = info.offsets[1:] - info.tail_offsets[1:]
    shift_R = torch.repeat_interleave(token_of_row_B, tail_lengths_B, output_size=info.num_rows)
    return shift_R + torch.arange(info.num_rows, device=shift_R.device)
