"""What an encoder needs to know about the jagged sequences that it reads.

Letters: B sequences, L tokens, R rows of the result.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipelines.batch import SequenceBatch


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
    """(B,) int64: index within the sequence of the first token of the session."""
    num_context: int
    """Context tokens at the head of every sequence."""
    num_candidates: Tensor
    """(B,) int64: candidates at the end, which see history and themselves only and share a
    position."""
    num_rows: int
    """R, known to the host, so that no device has to be waited for."""


def sequence_info(batch: SequenceBatch) -> SequenceInfo:
    """Return the structure of `batch`, its tails cut at the first position that a loss reads."""
    lengths = batch.lengths
    sequence = sequence_index(batch.offsets, batch.num_tokens)
    tail = torch.zeros_like(lengths)
    for positions in (batch.ranking_positions, batch.retrieval_positions):
        owner = sequence[positions]
        tail.scatter_reduce_(0, owner, batch.offsets[owner + 1] - positions, "amax")
    tail_offsets = torch.zeros_like(batch.offsets)
    tail_offsets[1:] = tail.cumsum(0)
    return SequenceInfo(
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
    )


def info_of_copy(info: SequenceInfo, batch: SequenceBatch, tail_offsets: Tensor) -> SequenceInfo:
    """Return the structure of a batch's copy on a device, without waiting for the device.

    Args:
        info: `sequence_info` of the batch in host memory.
        batch: the copy.
        tail_offsets: of `info`, copied likewise.
    """
    return replace(
        info,
        offsets=batch.offsets,
        tail_offsets=tail_offsets,
        timestamp=batch.timestamp,
        query_time=batch.query_time,
        session_start=batch.session_start,
        num_candidates=batch.num_candidates,
    )


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
