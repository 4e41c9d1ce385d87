"""What the kernels share: where a program works, which blocks it visits, SiLU."""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from kernels.hstu_attention._triton.mask import key_blocks, pick2, pick4, query_blocks
from kernels.hstu_attention._triton.tile import BUCKETS_PER_OCTAVE

TIME_LIMIT = gl.constexpr(2**30 - 1)
"""Seconds (34 years). The kernels keep times relative to the newest key of the sequence in int32;
what lies farther off counts as this far."""


@gluon.jit
def sequence(
    pid, num_blocks, order_ptr, offsets_ptr, q_offsets_ptr, num_candidates_ptr, H: gl.constexpr
):
    """Return block, head, b, and of sequence b: first key, tokens, history, first query, queries.

    All int32. Programs of one head are neighbours, so that they share its keys in the cache.
    """
    block = pid % num_blocks
    head = (pid // num_blocks) % H
    b = gl.load(order_ptr + pid // num_blocks // H)
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
def log2(x):
    """Logarithm by the special-function unit: absolute error below 1e-5 for x of 1 to 2^31."""
    return gl.inline_asm_elementwise(
        "lg2.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def load_times(
    time_ptr, start, first, num_rows, newest, BLOCK: gl.constexpr, layout: gl.constexpr
):  # fmt: skip
    """Return int32 times, relative to `newest`, of rows first .. of a sequence, 0 outside of it."""
    rows = first + gl.arange(0, BLOCK, layout)
    inside = (rows >= 0) & (rows < num_rows)
    time = gl.load(time_ptr + start + rows, mask=inside, other=0) - newest
    # Differences of two such times fit int32.
    return gl.minimum(gl.maximum(time, -TIME_LIMIT), TIME_LIMIT).to(gl.int32)


@gluon.jit
def time_bucket(gap, threshold_ptr, NUM_BUCKETS: gl.constexpr):
    """Return the bucket of a time difference (int32, at least 0), exactly as bias.time_bucket."""
    # The logarithm is off by less than 3e-5 buckets. Only where that leaves two of them is
    # a threshold read: entry i is the smallest difference of bucket i + 1.
    about = log2(gl.maximum(gap, 1).to(gl.float32)) * BUCKETS_PER_OCTAVE
    bucket = gl.minimum(gl.maximum(about - 2e-4, 0.0), NUM_BUCKETS).to(gl.int32)
    open_ = (bucket < NUM_BUCKETS) & (about + 2e-4 >= (bucket + 1).to(gl.float32))
    threshold = gl.load(threshold_ptr + bucket, mask=open_, other=0)
    return gl.where(open_ & (gap >= threshold), bucket + 1, bucket)


@gluon.jit
def half_score(
    product, half_alpha, row, col, history, query_time, key_time,
    position_ptr, time_ptr, threshold_ptr, REACH: gl.constexpr, NUM_BUCKETS: gl.constexpr,
):  # fmt: skip
    """Return (alpha * q k + bias) / 2, the argument of tanh in SiLU; all but product broadcast."""
    half = product * half_alpha
    if position_ptr is not None:
        distance = gl.minimum(row, history) - gl.minimum(col, history)
        distance = gl.minimum(gl.maximum(distance, -REACH), REACH)
        bias = gl.load(position_ptr + distance + REACH).to(gl.float32)
        if time_ptr is not None:
            gap = gl.abs(query_time - key_time)
            bucket = time_bucket(gap, threshold_ptr, NUM_BUCKETS)
            bias += gl.load(time_ptr + bucket).to(gl.float32)
        half = gl.fma(bias, 0.5, half)
    return half


@gluon.jit
def store_rows(base, x, start, first, num_rows, stride, column):
    """Write x to rows first .. of a sequence of `num_rows`, nothing beyond."""
    rows = first + gl.arange(0, x.shape[0], gl.SliceLayout(1, x.type.layout))
    cols = column + gl.arange(0, x.shape[1], gl.SliceLayout(0, x.type.layout))
    at = (start + rows).to(gl.int64)[:, None] * stride + cols[None, :]
    gl.store(base + at, x, mask=(rows < num_rows)[:, None])
