"""Relative bias on tiles of 64 by 64: what a pass prepares, and the bias of one tile.

By position, a tile is a Toeplitz matrix: a thread holds two rows 8 apart and columns 8 apart, so
half of what it needs it has already, and all of it is at fixed offsets from one address. For that
the table is spread out beforehand (`spread_table`): no distance has to be clamped.

By time, the differences of a tile away from the diagonal fall into a bucket or two. The smallest
and largest time of each 64 rows are taken beforehand (`relative_times`), which bounds the buckets
of a tile by two logarithms; most tiles then add one number, and the others compare with the few
thresholds between.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.experimental.gluon.language as gl
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon

from kernels._triton.launch import launch
from kernels._triton.sizes import cdiv
from kernels.hstu_attention._triton.tile import BUCKETS_PER_OCTAVE
from kernels.hstu_attention.bias import time_thresholds
from kernels.hstu_attention.structure import Structure

SPAN = 64
"""Rows whose smallest and largest time are kept."""
BEYOND = 256
"""Distances kept beyond the longest sequence: of rows past its end, in tiles that hold both."""
TIME_LIMIT = 2**30 - 1
"""Seconds (34 years). Times relative to the newest key of the sequence are kept in int32; what lies
farther off counts as this far, so that every difference fits too."""


class BiasInputs(NamedTuple):
    """Arguments of the kernels, in their order; None where there is no such bias."""

    position: Tensor | None = None
    """Half the bias by distance, float32; begins at distance 0, which others precede."""
    time_table: Tensor | None = None
    threshold: Tensor | None = None
    query_time: Tensor | None = None
    key_time: Tensor | None = None
    query_span: Tensor | None = None
    """int32 pairs: of query rows i * SPAN .. of sequence b, at q_offsets[b] // SPAN + b + i."""
    key_span: Tensor | None = None
    closest: Tensor | None = None
    """(B,) int32: no query is nearer in time to a key that it sees, or 0."""


def bias_inputs(structure: Structure) -> BiasInputs:
    """Return what the kernels read of the bias."""
    if structure.position_table is None:
        return BiasInputs()
    farthest = structure.max_len + BEYOND
    position = spread_table(structure.position_table, farthest)[farthest:]
    if structure.time_table is None:
        return BiasInputs(position)
    threshold = _thresholds(structure.time_table.numel() - 1, structure.offsets.device)
    return BiasInputs(position, structure.time_table, threshold, *relative_times(structure))


@triton.jit(do_not_specialize=["reach", "farthest"])
def _spread_kernel(table_ptr, out_ptr, reach, farthest, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    distance = tl.minimum(tl.maximum(at - farthest, -reach), reach)
    value = tl.load(table_ptr + distance + reach).to(tl.float32)
    tl.store(out_ptr + at, value * 0.5, mask=at <= 2 * farthest)


def spread_table(table: Tensor, farthest: int) -> Tensor:
    """Return (2 * farthest + 1,) float32: half the bias by position of distances -farthest .. ."""
    out = torch.empty(2 * farthest + 1, device=table.device, dtype=torch.float32)
    block = 1024
    grid = (cdiv(out.numel(), block), 1, 1)
    launch(_spread_kernel, grid, (table, out, table.numel() // 2, farthest), {"BLOCK": block})
    return out


@triton.jit
def _relative_to(
    time_ptr, out_ptr, span_ptr, b, start, length, newest,
    LIMIT: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Write the times of rows of one sequence relative to `newest`, and their spans."""
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    time = tl.load(time_ptr + start + at, mask=at < length, other=0) - newest
    time = tl.minimum(tl.maximum(time, -LIMIT), LIMIT).to(tl.int32)
    tl.store(out_ptr + start + at, time, mask=at < length)
    group = tl.program_id(1) * (BLOCK // SPAN) + tl.arange(0, BLOCK // SPAN)
    pair = span_ptr + (start // SPAN + b + group) * 2
    least = tl.min(tl.reshape(tl.where(at < length, time, LIMIT), (BLOCK // SPAN, SPAN)), 1)
    most = tl.max(tl.reshape(tl.where(at < length, time, -LIMIT), (BLOCK // SPAN, SPAN)), 1)
    tl.store(pair, least, mask=group * SPAN < length)
    tl.store(pair + 1, most, mask=group * SPAN < length)


@triton.jit
def _relative_times_kernel(
    offsets_ptr, q_offsets_ptr, query_time_ptr, key_time_ptr,
    query_out_ptr, key_out_ptr, query_span_ptr, key_span_ptr, closest_ptr,
    LIMIT: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    start = tl.load(offsets_ptr + b)
    length = tl.load(offsets_ptr + b + 1) - start
    q_start = tl.load(q_offsets_ptr + b)
    q_length = tl.load(q_offsets_ptr + b + 1) - q_start
    newest = tl.load(key_time_ptr + start + length - 1, mask=length > 0, other=0)
    _relative_to(
        key_time_ptr, key_out_ptr, key_span_ptr, b, start, length, newest, LIMIT, BLOCK, SPAN
    )
    _relative_to(
        query_time_ptr, query_out_ptr, query_span_ptr, b, q_start, q_length, newest,
        LIMIT, BLOCK, SPAN,
    )  # fmt: skip
    if tl.program_id(1) == 0:
        # Where keys are in order, none before a row's own is nearer to the row than its own.
        closest = tl.full([BLOCK], LIMIT, tl.int64)
        for first in range(0, length, BLOCK):
            at = first + tl.arange(0, BLOCK)
            own = tl.load(key_time_ptr + start + at, mask=at < length, other=0) - newest
            before = tl.load(key_time_ptr + start + at - 1, mask=(at > 0) & (at < length), other=0)
            in_order = (at == 0) | (at >= length) | (own >= before - newest)
            query = at - (length - q_length)
            asked = (query >= 0) & (at < length)
            time = tl.load(query_time_ptr + q_start + query, mask=asked, other=0) - newest
            own = tl.minimum(tl.maximum(own, -LIMIT), LIMIT)
            since = tl.minimum(tl.maximum(time, -LIMIT), LIMIT) - own
            closest = tl.minimum(closest, tl.where(asked, since, LIMIT))
            closest = tl.where(in_order, closest, 0)
        tl.store(closest_ptr + b, tl.maximum(tl.min(closest, 0), 0).to(tl.int32))


def relative_times(structure: Structure) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return query_time .. closest of BiasInputs, times in seconds since the newest key."""
    assert structure.query_time is not None
    assert structure.key_time is not None
    # Tiles are read to their end.
    times = [
        torch.empty(x.numel() + SPAN, device=x.device, dtype=torch.int32)
        for x in (structure.query_time, structure.key_time)
    ]
    spans = [x.new_empty(2 * (x.numel() // SPAN + structure.num_sequences + 1)) for x in times]
    closest = times[0].new_empty(structure.num_sequences)
    block = 1024
    grid = (structure.num_sequences, cdiv(structure.max_len, block), 1)
    if grid[0] * grid[1]:
        arguments = (
            structure.offsets, structure.q_offsets, structure.query_time, structure.key_time,
            *times, *spans, closest,
        )  # fmt: skip
        constants = {"LIMIT": TIME_LIMIT, "BLOCK": block, "SPAN": SPAN}
        launch(_relative_times_kernel, grid, arguments, constants)
    return times[0], times[1], spans[0], spans[1], closest


@functools.cache
def _thresholds(num_buckets: int, device: torch.device) -> Tensor:
    """Return (max(T, 1),) int32 on the device, copied there once: a copy waits for the GPU."""
    seconds = [min(x, 2**31 - 1) for x in time_thresholds(num_buckets)]
    return torch.tensor(seconds or [2**31 - 1], dtype=torch.int32, device=device)


@gluon.jit
def load_closest(closest_ptr, b, CONTEXT: gl.constexpr):
    """Return a bound on the time differences of visible pairs: every one counts."""
    if CONTEXT > 0:  # contextual rows see keys that follow
        return 0
    else:
        return gl.load(closest_ptr + b)


@gluon.jit
def load_span(span_ptr, start, b, first):
    """Return the smallest and the largest time of the rows first .. first + 63 of a sequence."""
    at = span_ptr + 2 * (start // 64 + b + first // 64)
    return gl.load(at), gl.load(at + 1)


@gluon.jit
def tile_buckets(
    row_first, row_last, closest, col_span_ptr, start, b, col_first, NUM_BUCKETS: gl.constexpr
):  # fmt: skip
    """Return bounds of the buckets of a tile: none outside, though one inside may be empty.

    row_first and row_last are the smallest and the largest time of its rows, closest is a bound
    on the differences of visible pairs.
    """
    col_first, col_last = load_span(col_span_ptr, start, b, col_first)
    least = gl.maximum(gl.maximum(row_first - col_last, col_first - row_last), closest)
    least = gl.maximum(least, 1)
    most = gl.maximum(gl.maximum(row_last - col_first, col_last - row_first), 1)
    # The float32 logarithm is off by less than 3e-5 buckets.
    low = gl.log2(least.to(gl.float32)) * BUCKETS_PER_OCTAVE - 2e-4
    high = gl.log2(most.to(gl.float32)) * BUCKETS_PER_OCTAVE + 2e-4
    low = gl.minimum(gl.maximum(low, 0.0), NUM_BUCKETS).to(gl.int32)
    return low, gl.minimum(high, NUM_BUCKETS).to(gl.int32)


@gluon.jit
def load_times(time_ptr, start, first, num_rows, BLOCK: gl.constexpr, layout: gl.constexpr):
    """Return int32 times of rows first .. of a sequence, 0 outside of it."""
    rows = first + gl.arange(0, BLOCK, layout)
    return gl.load(time_ptr + start + rows, mask=(rows >= 0) & (rows < num_rows), other=0)


@gluon.constexpr_function
def _toeplitz_load(columns, step):
    """Return PTX that loads the part of a tile that one thread holds, and its constraints.

    A thread of the products' layout holds rows r and r + 8 at columns c + 8 g and c + 8 g + 1, in
    the order column, row, g. Of a table read at base + step * (column - row), step 1 or -1, it
    needs few entries, at fixed distances from its first.
    """
    lines, first = [], {}
    for g in range(columns // 8):
        for row in range(2):
            for column in range(2):
                register = 4 * g + 2 * row + column
                offset = 4 * step * (8 * g - 8 * row + column)
                if offset in first:
                    lines.append(f"mov.b32 ${register}, ${first[offset]};")
                else:
                    first[offset] = register
                    lines.append(f"ld.global.nc.f32 ${register}, [${columns // 2} + {offset}];")
    return "\n".join(lines)


@gluon.constexpr_function
def _constraints(columns):
    return ",".join(["=f"] * (columns // 2) + ["l"] * (columns // 2))


@gluon.jit
def load_diagonals(table_ptr, row, col, STEP: gl.constexpr):
    """Return table[STEP * (col - row)] of a tile: row and col are ranges of the products' layout.

    One address, half of the loads (the layout repeats itself along diagonals) and no arithmetic.
    """
    COLUMNS: gl.constexpr = col.shape[0]
    return gl.inline_asm_elementwise(
        _toeplitz_load(COLUMNS, STEP), _constraints(COLUMNS),
        [table_ptr + STEP * (col[None, :] - row[:, None])],
        dtype=gl.float32, is_pure=True, pack=COLUMNS // 2,
    )  # fmt: skip


@gluon.constexpr_function
def _column_load(columns, step):
    """Return PTX that loads what a thread holds of the columns of a tile, and its constraints."""
    held = columns // 4
    offsets = [4 * step * (8 * (i // 2) + i % 2) for i in range(held)]
    loads = [f"ld.global.nc.b32 ${i}, [${held} + {x}];" for i, x in enumerate(offsets)]
    return "\n".join(loads), ",".join(["=r"] * held + ["l"] * held)


@gluon.jit
def load_columns(ptr, col, STEP: gl.constexpr):
    """Return the 32-bit numbers at ptr + STEP * col, a range of the layout's columns, as int32.

    One address: those of single elements would be kept in registers for the next look.
    """
    COLUMNS: gl.constexpr = col.shape[0]
    LOAD: gl.constexpr = _column_load(COLUMNS, STEP)
    return gl.inline_asm_elementwise(
        LOAD[0], LOAD[1], [ptr + STEP * col], dtype=gl.int32, is_pure=True, pack=COLUMNS // 4
    )


@gluon.jit
def apart(row_time, col_time, seconds):
    """Return whether the times of each pair, within TIME_LIMIT, differ by `seconds` at least.

    One comparison with what is known of a row: a tile of differences would take its registers.
    """
    # Neither sum overflows, and beyond the limit there is no time.
    early = row_time - gl.minimum(seconds, row_time + 2**30) + 1
    late = row_time + gl.minimum(seconds, 2**30 - row_time)
    nearer = (late - early).to(gl.uint32, bitcast=True)[:, None]
    return (col_time[None, :] - early[:, None]).to(gl.uint32, bitcast=True) >= nearer


@gluon.jit
def add_time_bias(bias, row_time, col_time_ptr, col, low, high, time_ptr, threshold_ptr):
    """Return `bias`, a tile, and half the bias by time; without one, `bias`.

    low and high bound the buckets of the tile; the times of columns, from col_time_ptr on, are
    read where they are needed. Steps from bucket to bucket are added to what is there: were the
    bias by time made apart, the compiler would keep both, and add them where the sum is read.
    """
    if time_ptr is not None:
        below = gl.load(time_ptr + low).to(gl.float32) * 0.5
        bias += below
        if low < high:
            col_time = load_columns(col_time_ptr, col, 1)
            for bucket in range(low, high):
                above = gl.load(time_ptr + bucket + 1).to(gl.float32) * 0.5
                is_above = apart(row_time, col_time, gl.load(threshold_ptr + bucket))
                bias = gl.where(is_above, bias + (above - below), bias)
                below = above
    return bias


@gluon.jit
def position_bias(
    position_ptr, row_first, row, col_first, col, history,
    STEP: gl.constexpr, CANDIDATES: gl.constexpr,
):  # fmt: skip
    """Return half the bias by position of a tile, float32; 0.0 without one.

    row and col count up from row_first and col_first; the distance is STEP * (col - row).
    """
    if position_ptr is None:
        return 0.0
    else:
        half = load_diagonals(position_ptr, row, col, STEP)
        if CANDIDATES:
            last = gl.maximum(row_first + row.shape[0], col_first + col.shape[0]) - 1
            if last >= history:  # candidates all stand at the end of the history
                if STEP == 1:
                    by_key = gl.load(position_ptr + gl.maximum(history - row, 0))[:, None]
                    moved = (col[None, :] >= history) & (row[:, None] < history)
                else:
                    by_key = load_columns(position_ptr + history, col, -1)
                    by_key = by_key.to(gl.float32, bitcast=True)[None, :]
                    moved = (row[:, None] >= history) & (col[None, :] < history)
                half = gl.where(moved, by_key, half)
        return half
