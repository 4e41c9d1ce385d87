"""What every kernel does with a tile: load and store rows, bias, slope of the activation."""

import triton
import triton.language as tl

from kernels._triton.silu import sigmoid
from kernels.hstu_attention.bias import TIME_BUCKET_WIDTH

BUCKETS_PER_OCTAVE = tl.constexpr(0.6931471805599453 / TIME_BUCKET_WIDTH)


@triton.jit
def sequence(
    pid, num_blocks, order_ptr, offsets_ptr, q_offsets_ptr, num_candidates_ptr, H: tl.constexpr
):
    """Return block, head, and of the sequence: first key, length, history, first query, queries."""
    block = pid % num_blocks
    head = (pid // num_blocks) % H
    b = tl.load(order_ptr + pid // num_blocks // H)
    key_start = tl.load(offsets_ptr + b)
    length = (tl.load(offsets_ptr + b + 1) - key_start).to(tl.int32)
    q_start = tl.load(q_offsets_ptr + b)
    q_len = (tl.load(q_offsets_ptr + b + 1) - q_start).to(tl.int32)
    history = length
    if num_candidates_ptr is not None:
        history = length - tl.load(num_candidates_ptr + b).to(tl.int32)
    return block, head, key_start, length, history, q_start, q_len


@triton.jit
def load_rows(
    base, first, num_rows, stride, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_DIM: tl.constexpr
):
    """Return rows first .. first + BLOCK - 1 of a (num_rows, DIM) matrix, zero outside of it."""
    rows = tl.arange(0, BLOCK)
    cols = tl.arange(0, BLOCK_DIM)
    inside = ((rows + first >= 0) & (rows + first < num_rows))[:, None]
    if DIM < BLOCK_DIM:
        inside = inside & (cols < DIM)[None, :]
    # int64 before the product; within the tile int32 is enough.
    tile = base + tl.cast(first, tl.int64) * stride
    return tl.load(tile + rows[:, None] * stride + cols[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(
    base,
    first,
    num_rows,
    stride,
    x,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Write x to rows first .. of a (num_rows, DIM) matrix, nothing outside of it."""
    rows = tl.arange(0, BLOCK)
    cols = tl.arange(0, BLOCK_DIM)
    inside = (rows + first < num_rows)[:, None] & (cols < DIM)[None, :]
    tile = base + tl.cast(first, tl.int64) * stride
    x = x.to(base.dtype.element_ty)
    tl.store(tile + rows[:, None] * stride + cols[None, :], x, mask=inside)


@triton.jit
def load_times(time_ptr, start, first, num_rows, BLOCK: tl.constexpr):
    """Return int64 times of rows first .. first + BLOCK - 1 of a sequence, 0 outside of it."""
    rows = first + tl.arange(0, BLOCK)
    inside = (rows >= 0) & (rows < num_rows)
    return tl.load(time_ptr + start + rows, mask=inside, other=0)


@triton.jit
def time_bucket(gap, threshold_ptr, NUM_BUCKETS: tl.constexpr):
    """Return the bucket of a time difference (int64, at least 0), exactly as bias.time_bucket."""
    # The float32 logarithm is off by less than 3e-5 buckets. Only where that leaves two of them is
    # a threshold read: entry i is the smallest difference of bucket i + 1.
    about = tl.log2(tl.maximum(gap, 1).to(tl.float32)) * BUCKETS_PER_OCTAVE
    bucket = tl.minimum(tl.maximum(about - 2e-4, 0.0), NUM_BUCKETS).to(tl.int32)
    open_ = (bucket < NUM_BUCKETS) & (about + 2e-4 >= (bucket + 1).to(tl.float32))
    threshold = tl.load(threshold_ptr + bucket, mask=open_, other=0)
    return tl.where(open_ & (gap >= threshold), bucket + 1, bucket)


@triton.jit
def relative_bias(
    row,
    col,
    history,
    query_time,
    key_time,
    position_ptr,
    time_ptr,
    threshold_ptr,
    REACH: tl.constexpr,
    NUM_BUCKETS: tl.constexpr,
):
    """Return the bias of each pair in float32; the first five arguments broadcast."""
    distance = tl.minimum(row, history) - tl.minimum(col, history)
    distance = tl.minimum(tl.maximum(distance, -REACH), REACH)
    bias = tl.load(position_ptr + distance + REACH).to(tl.float32)
    if time_ptr is not None:
        bucket = time_bucket(tl.abs(query_time - key_time), threshold_ptr, NUM_BUCKETS)
        bias += tl.load(time_ptr + bucket).to(tl.float32)
    return bias


@triton.jit
def silu_and_slope(x, FAST: tl.constexpr):
    """Return silu(x) and its derivative sigmoid(x) * (1 + x * (1 - sigmoid(x)))."""
    s = sigmoid(x, FAST)
    y = x * s
    return y, s + y * (1.0 - s)
