"""Where each row of a jagged result comes from: one description that all operators share.

Row r of sequence b of the result is row `first_start[b] + r` of the first source while
r < first_count[b], then row `second_start[b] + r - first_count[b]` of the second. Where a source is
missing, the row is filled with a constant.

Letters: B sequences, N rows of a padded sequence.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """Sources of the rows of a result; all int64."""

    out_offsets: Tensor
    """(B + 1,): rows of sequence b are out_offsets[b]:out_offsets[b + 1]."""
    first_start: Tensor
    """(B,)."""
    first_count: Tensor
    """(B,)."""
    second_start: Tensor
    """(B,)."""


def concat(a_offsets: Tensor, b_offsets: Tensor) -> Plan:
    """First: the rows of a; second: the rows of b."""
    return Plan(a_offsets + b_offsets, a_offsets[:-1], a_offsets.diff(), b_offsets[:-1])


def split_a(a_offsets: Tensor, b_offsets: Tensor) -> Plan:
    """First: the concatenation, of which each sequence gives its head."""
    start = (a_offsets + b_offsets)[:-1]
    return Plan(a_offsets, start, a_offsets.diff(), start)


def split_b(a_offsets: Tensor, b_offsets: Tensor) -> Plan:
    """First: the concatenation, of which each sequence gives its tail."""
    start = (a_offsets + b_offsets)[:-1] + a_offsets.diff()
    return Plan(b_offsets, start, b_offsets.diff(), start)


def newest(offsets: Tensor, tail_offsets: Tensor) -> Plan:
    """First: the sequences, of which each gives its last rows."""
    count = tail_offsets.diff()
    start = offsets[1:] - count
    return Plan(tail_offsets, start, count, start)


def oldest_filled(offsets: Tensor, tail_offsets: Tensor) -> Plan:
    """First: none; second: the tails, each put at the end of its sequence."""
    start = tail_offsets[:-1]
    return Plan(offsets, start, offsets.diff() - tail_offsets.diff(), start)


def to_padded(offsets: Tensor, max_len: int) -> Plan:
    """First: the sequences, of which each gives at most N rows; N rows a sequence."""
    out_offsets = torch.arange(offsets.numel(), device=offsets.device) * max_len
    return Plan(out_offsets, offsets[:-1], offsets.diff().clamp(max=max_len), offsets[:-1])


def from_padded(offsets: Tensor, max_len: int) -> Plan:
    """First: padded rows, N a sequence; what lies beyond N is filled."""
    start = torch.arange(offsets.numel() - 1, device=offsets.device) * max_len
    return Plan(offsets, start, offsets.diff().clamp(max=max_len), start)
