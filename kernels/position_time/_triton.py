"""Input encoding: one read and one write of each row; the tables stay in cache.

Forward:  y = scale * x + position_table[p] + time_table[t]
Backward: dx = scale * dy (torch's own product)
          d table[i] = sum of dy over the rows whose index is i

The sums are made in a fixed order, so that they are the same in every run: rows are sorted by index
and cut wherever the index changes and at every 128th row; each piece is added up by one program,
then the pieces of each index. An index that many rows share costs no more than the others.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.rows import forward_tile

PIECE = 128
"""Most rows that one program adds up."""


@triton.jit
def _position_time_fwd_kernel(
    x_ptr,
    position_table_ptr,
    position_ptr,
    time_table_ptr,
    time_ptr,
    y_ptr,
    L,
    num_positions,
    num_times,
    stride_x,
    scale,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_TIME: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    mask_rows = rows < L
    mask_cols = (cols < D)[None, :]
    mask = mask_rows[:, None] & mask_cols
    x = tl.load(x_ptr + rows[:, None] * stride_x + cols[None, :], mask=mask, other=0.0)
    # An index outside its table reads nothing and makes the row NaN.
    index = tl.load(position_ptr + rows, mask=mask_rows, other=0).to(tl.int64)
    found = mask_rows & (index >= 0) & (index < num_positions)
    encoding = tl.load(
        position_table_ptr + index[:, None] * D + cols[None, :],
        mask=found[:, None] & mask_cols,
        other=float("nan"),
    ).to(tl.float32)
    if HAS_TIME:
        index = tl.load(time_ptr + rows, mask=mask_rows, other=0).to(tl.int64)
        found = mask_rows & (index >= 0) & (index < num_times)
        encoding += tl.load(
            time_table_ptr + index[:, None] * D + cols[None, :],
            mask=found[:, None] & mask_cols,
            other=float("nan"),
        ).to(tl.float32)
    y = scale * x.to(tl.float32) + encoding
    tl.store(y_ptr + rows[:, None] * D + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _segment_sum_kernel(
    source_ptr,
    order_ptr,
    bounds_ptr,
    out_ptr,
    stride_source,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_ORDER: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    start = tl.load(bounds_ptr + segment)
    end = tl.load(bounds_ptr + segment + 1)
    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for first in range(start, end, ROWS):
        place = first + tl.arange(0, ROWS)
        row = place
        if HAS_ORDER:
            row = tl.load(order_ptr + place, mask=place < end, other=0)
        mask = (place < end)[:, None] & (cols < D)[None, :]
        found = tl.load(
            source_ptr + row[:, None] * stride_source + cols[None, :], mask=mask, other=0.0
        )
        total += found.to(tl.float32)
    tl.store(out_ptr + segment * D + cols, tl.sum(total, 0), mask=cols < D)


def position_time_fwd(
    x: Tensor,
    position_table: Tensor,
    position: Tensor,
    time_table: Tensor | None,
    time: Tensor | None,
    scale: float,
) -> Tensor:
    """Return y (L, D). x may have any row stride; tables and indices are contiguous."""
    L, D = x.shape
    y = x.new_empty(L, D)
    if L == 0:
        return y
    rows, columns, warps = forward_tile(D)
    _position_time_fwd_kernel[(triton.cdiv(L, rows),)](
        x,
        position_table,
        position,
        time_table,
        time,
        y,
        L,
        position_table.shape[0],
        0 if time_table is None else time_table.shape[0],
        x.stride(0),
        scale,
        D=D,
        ROWS=rows,
        BLOCK_D=columns,
        HAS_TIME=time_table is not None,
        num_warps=warps,
    )
    return y


def sum_by_index(rows: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """Return (num_rows, D) float32: row i is the sum of the rows whose index is i.

    Args:
        rows: (L, D), any row stride.
        index: (L,) int64; rows whose index is outside 0 .. num_rows - 1 count nowhere.
        num_rows: rows of the result.
    """
    L = rows.shape[0]
    ascending, order = index.sort(stable=True)
    starts = torch.searchsorted(ascending, torch.arange(num_rows + 1, device=index.device))
    every = torch.arange(0, L, PIECE, device=index.device)
    cuts = torch.cat([starts, every]).sort().values
    pieces = _segment_sum(rows, order, cuts)
    return _segment_sum(pieces, None, torch.searchsorted(cuts, starts))


def _segment_sum(source: Tensor, order: Tensor | None, bounds: Tensor) -> Tensor:
    """Return (S, D) float32: sums of source[order[bounds[s]:bounds[s + 1]]]."""
    D = source.shape[1]
    out = source.new_empty(bounds.numel() - 1, D, dtype=torch.float32)
    if out.numel() == 0:
        return out
    block_d = min(256, triton.next_power_of_2(D))
    _segment_sum_kernel[(out.shape[0], triton.cdiv(D, block_d))](
        source,
        order,
        bounds,
        out,
        source.stride(0),
        D=D,
        ROWS=8,
        BLOCK_D=block_d,
        HAS_ORDER=order is not None,
        num_warps=4,
    )
    return out
