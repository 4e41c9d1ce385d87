"""What the kernels share: where a program works, which blocks it visits, SiLU."""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from kernels.hstu_attention._triton.mask import key_blocks, pick2, pick4, query_blocks


@gluon.jit
def sequence(
    num_blocks, order_ptr, offsets_ptr, q_offsets_ptr, num_candidates_ptr,
    H: gl.constexpr, BY_BLOCK: gl.constexpr,
):  # fmt: skip
    """Return block, head, b, and of sequence b: first key, tokens, history, first query, queries.

    All int32. Programs of one head are neighbours, so that they share its keys in the cache. With
    BY_BLOCK those of one block are: where few blocks have nearly all the work, none of them must
    start last.
    """
    pid = gl.program_id(0)
    heads = gl.num_programs(0) // num_blocks
    block = pid % num_blocks
    sequence_head = pid // num_blocks
    if BY_BLOCK:
        block = pid // heads
        sequence_head = pid % heads
    head = sequence_head % H
    b = gl.load(order_ptr + sequence_head // H)
    key_start = gl.load(offsets_ptr + b).to(gl.int32)
    length = gl.load(offsets_ptr + b + 1).to(gl.int32) - key_start
    q_start = gl.load(q_offsets_ptr + b).to(gl.int32)
    q_len = gl.load(q_offsets_ptr + b + 1).to(gl.int32) - q_start
    history = length
    if num_candidates_ptr is not None:
        history = length - gl.load(num_candidates_ptr + b).to(gl.int32)
    return block, head, b, key_start, length, history, q_start, q_len


@gluon.jit
def visited_keys(
    row_begin, row_end, history, BLOCK: gl.constexpr,
    NUM_CONTEXT: gl.constexpr, CONTEXT: gl.constexpr, WINDOW: gl.constexpr,
    GLOBAL_ROWS: gl.constexpr, GLOBAL_COLUMNS: gl.constexpr,
):  # fmt: skip
    """Return the numbers of partly and of wholly visible key blocks, and what `nth_block` takes."""
    full0, n0, full1, n1, part0, m0, part1, m1, part2, m2, part3, m3 = key_blocks(
        row_begin, row_end, history, BLOCK,
        NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS,
    )  # fmt: skip
    return m0 + m1 + m2 + m3, n0 + n1, full0, n0, full1, part0, m0, part1, m1, part2, m2, part3


@gluon.jit
def visiting_queries(
    key_begin, key_end, length, history, first_row, BLOCK: gl.constexpr,
    NUM_CONTEXT: gl.constexpr, CONTEXT: gl.constexpr, WINDOW: gl.constexpr,
    GLOBAL_ROWS: gl.constexpr, GLOBAL_COLUMNS: gl.constexpr,
):  # fmt: skip
    """Return the numbers of query blocks that see a part, and all of a key block, and so on."""
    full0, n0, full1, n1, part0, m0, part1, m1, part2, m2, part3, m3 = query_blocks(
        key_begin, key_end, length, history, first_row, BLOCK,
        NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS,
    )  # fmt: skip
    return m0 + m1 + m2 + m3, n0 + n1, full0, n0, full1, part0, m0, part1, m1, part2, m2, part3


@gluon.jit
def part_block(i, part0, m0, part1, m1, part2, m2, part3):
    """Return the i-th partly visible block."""
    return pick4(i, part0, m0, part1, m1, part2, m2, part3)


@gluon.jit
def full_block(i, full0, n0, full1):
    """Return the i-th wholly visible block."""
    return pick2(i, full0, n0, full1)


@gluon.jit
def tanh(x):
    """Hyperbolic tangent by the special-function unit: relative error 2^-11, below bf16's."""
    return gl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def load_times(time_ptr, start, first, num_rows, BLOCK: gl.constexpr, layout: gl.constexpr):
    """Return int32 times of rows first .. of a sequence, 0 (its newest key's) outside of it."""
    rows = first + gl.arange(0, BLOCK, layout)
    return gl.load(time_ptr + start + rows, mask=(rows >= 0) & (rows < num_rows), other=0)


@gluon.jit
def load_thresholds(threshold_ptr, NUM_BUCKETS: gl.constexpr, PADDED: gl.constexpr):
    """Return the smallest difference of each bucket 1 .. NUM_BUCKETS, every warp with all."""
    warps: gl.constexpr = gl.BlockedLayout([1, PADDED // 32], [1, 32], [4, 1], [1, 0])
    i = gl.arange(0, PADDED, gl.SliceLayout(0, warps))
    return gl.load(threshold_ptr + i, mask=i < NUM_BUCKETS, other=2147483647)


@gluon.jit
def time_bias(
    row_time, row_first, row_last, col_time, thresholds, time_ptr, threshold_ptr
):  # fmt: skip
    """Return the bias by time of a tile, float32, from times (int32) of its rows and columns.

    row_first and row_last are the smallest and the largest of row_time, taken once for many tiles.
    The differences in a tile away from the diagonal fall into a bucket or two, so comparing each
    with the few thresholds between them takes less than its logarithm and a look into the table.
    """
    col_first = gl.min(col_time, 0)
    col_last = gl.max(col_time, 0)
    least = gl.maximum(gl.maximum(row_first - col_last, col_first - row_last), 0)
    most = gl.maximum(row_last - col_first, col_last - row_first)
    bucket = gl.sum((least >= thresholds).to(gl.int32), 0)
    last = gl.sum((most >= thresholds).to(gl.int32), 0)
    gap = gl.abs(row_time[:, None] - col_time[None, :])
    bias = gap.to(gl.float32) * 0.0 + gl.load(time_ptr + bucket).to(gl.float32)
    for b in range(bucket, last):
        above = gl.load(time_ptr + b + 1).to(gl.float32)
        bias = gl.where(gap >= gl.load(threshold_ptr + b), above, bias)
    return bias


@gluon.jit
def half_score(
    product, half_alpha, row, col, history, bias, position_ptr, HAS_TIME: gl.constexpr,
    REACH: gl.constexpr,
):  # fmt: skip
    """Return (alpha * q k + bias) / 2, the argument of tanh in SiLU.

    row and col broadcast to the tile; `bias` is the one by time, read where HAS_TIME.
    """
    half = product * half_alpha
    if position_ptr is not None:
        distance = gl.minimum(row, history) - gl.minimum(col, history)
        distance = gl.minimum(gl.maximum(distance, -REACH), REACH)
        by_position = gl.load(position_ptr + distance + REACH).to(gl.float32)
        if HAS_TIME:
            by_position += bias
        half = gl.fma(by_position, 0.5, half)
    return half


@gluon.jit
def store_rows(base, x, start, first, num_rows, stride, column):
    """Write x to rows first .. of a sequence of `num_rows`, nothing beyond."""
    rows = first + gl.arange(0, x.shape[0], gl.SliceLayout(1, x.type.layout))
    cols = column + gl.arange(0, x.shape[1], gl.SliceLayout(0, x.type.layout))
    at = (start + rows).to(gl.int64)[:, None] * stride + cols[None, :]
    gl.store(base + at, x, mask=(rows < num_rows)[:, None])
