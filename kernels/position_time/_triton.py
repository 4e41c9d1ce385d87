"""Input encoding: one read and one write of each row; the tables stay in cache.

Forward:  y = scale * x + position_table[p] + time_table[t]
Backward: dx = scale * dy (torch's own product)
          d table[i] = sum of dy over the rows whose index is i

The sums are made in a fixed order, so that they are the same in every run. The entries (a row and
its index) of all tables are sorted together, once; the run of entries of an index is cut at every
128th place of the sorted order; each piece is added up by one program, then the pieces of each
index. An index that many rows share costs no more than the others.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.rows import forward_tile
from kernels._triton.sizes import cdiv, next_power_of_2

PIECE = 128
"""Most entries that one program adds up."""


@triton.jit(do_not_specialize=["L"])
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
    # Tokens pass by the L1 cache, which then holds the common rows of the tables.
    x = tl.load(
        x_ptr + rows[:, None] * stride_x + cols[None, :],
        mask=mask,
        other=0.0,
        cache_modifier=".cg",
    )
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
def _cast_kernel(a_ptr, b_ptr, out_ptr, num_a, num_b, BLOCK: tl.constexpr):
    """Write a, then b, in the dtype of the result."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_b = (offs >= num_a) & (offs < num_a + num_b)
    a = tl.load(a_ptr + offs, mask=offs < num_a, other=0.0)
    b = tl.load(b_ptr + (offs - num_a), mask=in_b, other=0.0)
    value = tl.where(in_b, b.to(tl.float32), a.to(tl.float32))
    tl.store(out_ptr + offs, value.to(out_ptr.dtype.element_ty), mask=offs < num_a + num_b)


@triton.jit(do_not_specialize=["L"])
def _key_kernel(index_ptr, key_ptr, L, num_rows, first, outside, BLOCK: tl.constexpr):
    """Write first + index, or `outside` where the index is not of the table."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(index_ptr + offs, mask=offs < L, other=-1)
    key = tl.where((index >= 0) & (index < num_rows), first + index, outside)
    tl.store(key_ptr + offs, key.to(key_ptr.dtype.element_ty), mask=offs < L)


@triton.jit(do_not_specialize=["L"])
def _piece_kernel(
    source_ptr,
    order_ptr,
    starts_ptr,
    pieces_ptr,
    L,
    num_rows,
    stride_source,
    D: tl.constexpr,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SEARCH_STEPS: tl.constexpr,
):
    # Index i has pieces i + starts[i] // PIECE and those that follow, one a block of PIECE places;
    # the last index with a piece at or before this one is the one that it may belong to.
    piece = tl.program_id(0).to(tl.int64)
    low = piece * 0
    high = low + num_rows - 1
    for _ in range(SEARCH_STEPS):
        middle = (low + high + 1) // 2
        first = middle + tl.load(starts_ptr + middle) // PIECE
        low = tl.where(first <= piece, middle, low)
        high = tl.where(first <= piece, high, middle - 1)
    block = piece - low
    start = tl.maximum(tl.load(starts_ptr + low), block * PIECE)
    end = tl.minimum(tl.load(starts_ptr + low + 1), (block + 1) * PIECE)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for first in range(start, end, ROWS):
        place = first + tl.arange(0, ROWS)
        row = tl.load(order_ptr + place, mask=place < end, other=0) % L
        mask = (place < end)[:, None] & (cols < D)[None, :]
        found = tl.load(
            source_ptr + row[:, None] * stride_source + cols[None, :], mask=mask, other=0.0
        )
        total += found.to(tl.float32)
    if start < end:
        tl.store(pieces_ptr + piece * D + cols, tl.sum(total, 0), mask=cols < D)


@triton.jit
def _add_pieces_kernel(
    pieces_ptr,
    starts_ptr,
    out_ptr,
    D: tl.constexpr,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    start = tl.load(starts_ptr + index)
    end = tl.load(starts_ptr + index + 1)
    # No entries: no pieces.
    stop = tl.where(start < end, tl.cdiv(end, PIECE), 0)
    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for first in range(start // PIECE, stop, ROWS):
        block = first + tl.arange(0, ROWS)
        mask = (block < stop)[:, None] & (cols < D)[None, :]
        total += tl.load(
            pieces_ptr + (index + block)[:, None] * D + cols[None, :], mask=mask, other=0.0
        )
    tl.store(out_ptr + index * D + cols, tl.sum(total, 0), mask=cols < D)


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
    _position_time_fwd_kernel[(cdiv(L, rows),)](
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


def cast_tables(
    position_table: Tensor, time_table: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Return the tables in `dtype`, contiguous, in one launch at most."""
    tables = [position_table, *([] if time_table is None else [time_table])]
    tables = [table.contiguous() for table in tables]
    if any(table.dtype != dtype for table in tables):
        sizes = [table.shape[0] for table in tables]
        D = position_table.shape[1]
        out = position_table.new_empty(sum(sizes), D, dtype=dtype)
        if out.numel() > 0:
            _cast_kernel[(cdiv(out.numel(), 4096),)](
                tables[0],
                tables[-1],
                out,
                tables[0].numel(),
                out.numel() - tables[0].numel(),
                BLOCK=4096,
                num_warps=4,
            )
        tables = list(out.split(sizes))
    return tables[0], tables[1] if time_table is not None else None


def sum_by_index(rows: Tensor, indices: list[Tensor], sizes: list[int]) -> Tensor:
    """Return the sums of all tables, one below the other: (sum(sizes), D) float32.

    Row i of a table is the sum of the rows whose index in it is i.

    Args:
        rows: (L, D), any row stride.
        indices: (L,) int64 each; rows whose index is outside a table count nowhere in it.
        sizes: rows of each table.
    """
    (L, D), num_rows = rows.shape, sum(sizes)
    if L == 0 or num_rows == 0:
        return rows.new_zeros(num_rows, D, dtype=torch.float32)
    # A radix sort takes a pass for each byte of a key.
    dtype = torch.int16 if num_rows < 2**15 else torch.int32 if num_rows < 2**31 else torch.int64
    keys = rows.new_empty(len(indices) * L, dtype=dtype)
    first = 0
    for place, (index, size) in enumerate(zip(indices, sizes, strict=True)):
        _key_kernel[(cdiv(L, 1024),)](
            index, keys[place * L :], L, size, first, num_rows, BLOCK=1024, num_warps=4
        )
        first += size
    ascending, order = keys.sort(stable=True)
    bounds = torch.arange(num_rows + 1, device=rows.device, dtype=dtype)
    starts = torch.searchsorted(ascending, bounds)
    num_pieces = num_rows + keys.numel() // PIECE
    pieces = rows.new_empty(num_pieces, D, dtype=torch.float32)
    out = rows.new_empty(num_rows, D, dtype=torch.float32)
    block_d = min(256, next_power_of_2(D))
    blocks = cdiv(D, block_d)
    _piece_kernel[(num_pieces, blocks)](
        rows,
        order,
        starts,
        pieces,
        L,
        num_rows,
        rows.stride(0),
        D=D,
        PIECE=PIECE,
        ROWS=16,
        BLOCK_D=block_d,
        SEARCH_STEPS=num_rows.bit_length(),
        num_warps=4,
    )
    _add_pieces_kernel[(num_rows, blocks)](
        pieces, starts, out, D=D, PIECE=PIECE, ROWS=8, BLOCK_D=block_d, num_warps=4
    )
    return out
