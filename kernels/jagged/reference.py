"""Rows of a jagged result in eager PyTorch, differentiable in both sources.

Letters: a and b, two sets of jagged rows of the same B sequences (b may be padded: N rows each).
"""

from typing import Literal

import torch
from torch import Tensor

Operator = Literal[
    "concat", "split_a", "split_b", "newest", "oldest_zero", "to_padded", "from_padded"
]


def gather(
    operator: Operator,
    num_rows: int,
    a_offsets: Tensor,
    b_offsets: Tensor | int,
    first_ND: Tensor | None,
    second_ND: Tensor | None = None,
    fill: float = 0.0,
) -> Tensor:
    """Return the (num_rows, D) rows of a result; rows after its last sequence are filled.

    Row r of a sequence is row first_start + r of the first source while r < count, then row
    second_start + r - count of the second. Where a source is missing, the row is filled.

    Args:
        operator: which result.
        num_rows: rows of the result.
        a_offsets: (B + 1,) int64.
        b_offsets: (B + 1,) int64, or N.
        first_ND: rows of the first source, or None.
        second_ND: rows of the second source, or None.
        fill: of rows without a source.
    """
    source = first_ND if first_ND is not None else second_ND
    assert source is not None
    if isinstance(b_offsets, int):
        b_offsets = torch.arange(a_offsets.numel(), device=a_offsets.device) * b_offsets
    out = source.new_full((num_rows, source.shape[1]), fill)
    if num_rows == 0 or a_offsets.numel() == 1:
        return torch.cat([out, source[:0]])
    out_offsets, first_start, count, second_start = _sources(operator, a_offsets, b_offsets)
    row = torch.arange(num_rows, device=source.device)
    sequence = torch.searchsorted(out_offsets[1:], row, right=True)
    inside = sequence < count.numel()
    sequence = sequence.clamp(max=count.numel() - 1)
    row = row - out_offsets[sequence]
    if operator in ("split_a", "split_b", "newest"):
        return source.index_select(0, first_start[sequence] + row)  # No row is filled.
    in_first = row < count[sequence]
    for values, chosen, start in (
        (first_ND, in_first, first_start[sequence]),
        (second_ND, ~in_first, (second_start - count)[sequence]),
    ):
        if values is not None:
            to = (inside & chosen).nonzero().squeeze(1)
            out = out.index_copy(0, to, values.index_select(0, (start + row)[to]))
    return out


def _sources(
    operator: Operator, a_offsets: Tensor, b_offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return out_offsets (B + 1,), first_start, count and second_start (B,)."""
    a, b, length_a, length_b = a_offsets[:-1], b_offsets[:-1], a_offsets.diff(), b_offsets.diff()
    if operator == "concat":
        return a_offsets + b_offsets, a, length_a, b
    if operator == "split_a":
        return a_offsets, a + b, length_a, b
    if operator == "split_b":
        return b_offsets, a + b + length_a, length_b, b
    if operator == "newest":
        return b_offsets, a + length_a - length_b, length_b, b
    if operator == "oldest_zero":
        return a_offsets, a, length_a - length_b, b
    if operator == "to_padded":
        return b_offsets, a, torch.minimum(length_a, length_b), b
    return a_offsets, b, torch.minimum(length_a, length_b), a
