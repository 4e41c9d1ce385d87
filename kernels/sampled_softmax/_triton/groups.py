"""What the kernels share: blocks of rows of a group, their vectors and logits."""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_DIM = 512
"""Widest vector that one program holds."""


@triton.jit
def _find(bounds_ptr, value, G, STEPS: tl.constexpr):
    """Return how many of bounds[1:] are at most `value`: the group that `value` falls into."""
    low = 0
    high = G
    for _ in range(STEPS):
        middle = (low + high) // 2
        below = tl.load(bounds_ptr + middle + 1, mask=low < high, other=0) <= value
        searching = low < high
        low = tl.where(searching & below, middle + 1, low)
        high = tl.where(searching & (below == 0), middle, high)
    return low


@triton.jit
def rows_of_block(blocks_ptr, offsets_ptr, G, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Return the group, the rows and the end of the group of this program; group G means none."""
    block = tl.program_id(0)
    group = _find(blocks_ptr, block, G, STEPS)
    known = group < G
    first = tl.load(offsets_ptr + group, mask=known, other=0)
    end = tl.load(offsets_ptr + group + 1, mask=known, other=0)
    start = first + (block - tl.load(blocks_ptr + group, mask=known, other=0)) * BLOCK
    return group, start + tl.arange(0, BLOCK), end


@triton.jit
def load_vectors(ptr, rows, stride, wanted, cols, D):
    mask = wanted[:, None] & (cols < D)[None, :]
    return tl.load(ptr + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0)


@triton.jit
def positive_logit(q, positive, log_q_ptr, rows, wanted, inverse_t, HAS_LOG_Q: tl.constexpr):
    logit = tl.sum(q.to(tl.float32) * positive.to(tl.float32), 1) * inverse_t
    if HAS_LOG_Q:
        logit -= tl.load(log_q_ptr + rows, mask=wanted, other=0.0).to(tl.float32)
    return logit


@triton.jit
def pair_logits(
    q, k, row_ids, ids, is_row, is_negative, log_q_ptr, columns, inverse_t,
    HAS_LOG_Q: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return logits (rows, negatives); -inf where there is no pair."""
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * inverse_t
    if HAS_LOG_Q:
        logits -= tl.load(log_q_ptr + columns, mask=is_negative, other=0.0).to(tl.float32)[None, :]
    pair = is_row[:, None] & is_negative[None, :] & (row_ids[:, None] != ids[None, :])
    return tl.where(pair, logits, float("-inf"))


def blocks_before(offsets: Tensor, block: int) -> Tensor:
    """Return (G + 1,): how many blocks the groups before each one have."""
    counts = (offsets.diff() + block - 1) // block
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def launch_options(query: Tensor) -> dict[str, object]:
    """Return what the three kernels are compiled for."""
    D = query.shape[1]
    columns = max(16, triton.next_power_of_2(D))
    # float32 products run on the ordinary units and are unrolled: small blocks and more warps. In
    # 16 bits 64 rows are the least that Hopper's matrix instructions take; at 512 they do not fit.
    if query.dtype == torch.float32:
        block, warps = (32 if columns <= 128 else 16), 8
    elif columns <= 256:
        block, warps = 64, 4 if columns <= 128 else 8
    else:
        block, warps = 32, 8
    return {
        "D": D,
        "BLOCK_D": columns,
        "BLOCK_R": block,
        "BLOCK_N": block,
        "PRECISION": "ieee",
        "num_warps": warps,
        "num_stages": 2,
    }
