"""Sampled softmax without storing a logit.

logit_rn = (q_r . k_n) / T - log_q_n over the negatives n of the group of row r whose id is not that
of the positive; logit_r that of the positive.

Forward:  lse_r = log(exp(logit_r) + sum_n exp(logit_rn)), kept;  loss_r = lse_r - logit_r
Backward: p_rn = exp(logit_rn - lse_r) is computed again in tiles, c_r = dloss_r / T:
          dq_r = c_r (sum_n p_rn k_n + (p_r - 1) pos_r),  dpos_r = c_r (p_r - 1) q_r
          dk_n = sum_r c_r p_rn q_r

R rows, N negatives, D dims. A program owns a block of rows (of negatives for dk) of one group; it
finds its group by binary search in the number of blocks of the groups before. Every sum has one
order: results are the same in every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.rows import num_programs

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
def _rows_of_block(blocks_ptr, offsets_ptr, G, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Return the group, the rows and the end of the group of this program; group G means none."""
    block = tl.program_id(0)
    group = _find(blocks_ptr, block, G, STEPS)
    known = group < G
    first = tl.load(offsets_ptr + group, mask=known, other=0)
    end = tl.load(offsets_ptr + group + 1, mask=known, other=0)
    start = first + (block - tl.load(blocks_ptr + group, mask=known, other=0)) * BLOCK
    return group, start + tl.arange(0, BLOCK), end


@triton.jit
def _vectors(ptr, rows, stride, wanted, cols, D):
    mask = wanted[:, None] & (cols < D)[None, :]
    return tl.load(ptr + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0)


@triton.jit
def _positive_logit(q, positive, log_q_ptr, rows, wanted, inverse_t, HAS_LOG_Q: tl.constexpr):
    logit = tl.sum(q.to(tl.float32) * positive.to(tl.float32), 1) * inverse_t
    if HAS_LOG_Q:
        logit -= tl.load(log_q_ptr + rows, mask=wanted, other=0.0).to(tl.float32)
    return logit


@triton.jit
def _logits(
    q, k, row_ids, ids, is_row, is_negative, log_q_ptr, columns, inverse_t,
    HAS_LOG_Q: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return logits (rows, negatives); -inf where there is no pair."""
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * inverse_t
    if HAS_LOG_Q:
        logits -= tl.load(log_q_ptr + columns, mask=is_negative, other=0.0).to(tl.float32)[None, :]
    pair = is_row[:, None] & is_negative[None, :] & (row_ids[:, None] != ids[None, :])
    return tl.where(pair, logits, float("-inf"))


@triton.jit
def _sampled_softmax_fwd_kernel(
    query_ptr,
    positive_ptr,
    negative_ptr,
    row_blocks_ptr,
    query_offsets_ptr,
    negative_offsets_ptr,
    positive_id_ptr,
    negative_id_ptr,
    positive_log_q_ptr,
    negative_log_q_ptr,
    loss_ptr,
    lse_ptr,
    stride_query,
    stride_positive,
    stride_negative,
    inverse_t,
    G,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEPS: tl.constexpr,
    HAS_POSITIVE_LOG_Q: tl.constexpr,
    HAS_NEGATIVE_LOG_Q: tl.constexpr,
    PRECISION: tl.constexpr,
):
    group, rows, row_end = _rows_of_block(row_blocks_ptr, query_offsets_ptr, G, BLOCK_R, STEPS)
    if group < G:
        cols = tl.arange(0, BLOCK_D)
        is_row = rows < row_end
        q = _vectors(query_ptr, rows, stride_query, is_row, cols, D)
        positive = _vectors(positive_ptr, rows, stride_positive, is_row, cols, D)
        row_ids = tl.load(positive_id_ptr + rows, mask=is_row, other=0)
        logit = _positive_logit(
            q, positive, positive_log_q_ptr, rows, is_row, inverse_t, HAS_POSITIVE_LOG_Q
        )
        # Running maximum and sum; both start at the positive.
        top = logit
        total = tl.full((BLOCK_R,), 1.0, tl.float32)
        start = tl.load(negative_offsets_ptr + group)
        end = tl.load(negative_offsets_ptr + group + 1)
        for first in range(start, end, BLOCK_N):
            columns = first + tl.arange(0, BLOCK_N)
            is_negative = columns < end
            k = _vectors(negative_ptr, columns, stride_negative, is_negative, cols, D)
            ids = tl.load(negative_id_ptr + columns, mask=is_negative, other=0)
            logits = _logits(
                q, k, row_ids, ids, is_row, is_negative, negative_log_q_ptr, columns, inverse_t,
                HAS_NEGATIVE_LOG_Q, PRECISION,
            )  # fmt: skip
            new_top = tl.maximum(top, tl.max(logits, 1))
            total = total * tl.exp(top - new_top) + tl.sum(tl.exp(logits - new_top[:, None]), 1)
            top = new_top
        # Not lse - logit: where the positive is on top, a small loss keeps its digits.
        tl.store(loss_ptr + rows, (top - logit) + tl.log(total), mask=is_row)
        tl.store(lse_ptr + rows, top + tl.log(total), mask=is_row)


@triton.jit
def _sampled_softmax_bwd_rows_kernel(
    dloss_ptr,
    query_ptr,
    positive_ptr,
    negative_ptr,
    row_blocks_ptr,
    query_offsets_ptr,
    negative_offsets_ptr,
    positive_id_ptr,
    negative_id_ptr,
    positive_log_q_ptr,
    negative_log_q_ptr,
    lse_ptr,
    dquery_ptr,
    dpositive_ptr,
    stride_query,
    stride_positive,
    stride_negative,
    inverse_t,
    G,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEPS: tl.constexpr,
    HAS_POSITIVE_LOG_Q: tl.constexpr,
    HAS_NEGATIVE_LOG_Q: tl.constexpr,
    PRECISION: tl.constexpr,
):
    group, rows, row_end = _rows_of_block(row_blocks_ptr, query_offsets_ptr, G, BLOCK_R, STEPS)
    if group < G:
        cols = tl.arange(0, BLOCK_D)
        is_row = rows < row_end
        q = _vectors(query_ptr, rows, stride_query, is_row, cols, D)
        row_ids = tl.load(positive_id_ptr + rows, mask=is_row, other=0)
        lse = tl.load(lse_ptr + rows, mask=is_row, other=0.0)
        dq = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        start = tl.load(negative_offsets_ptr + group)
        end = tl.load(negative_offsets_ptr + group + 1)
        for first in range(start, end, BLOCK_N):
            columns = first + tl.arange(0, BLOCK_N)
            is_negative = columns < end
            k = _vectors(negative_ptr, columns, stride_negative, is_negative, cols, D)
            ids = tl.load(negative_id_ptr + columns, mask=is_negative, other=0)
            logits = _logits(
                q, k, row_ids, ids, is_row, is_negative, negative_log_q_ptr, columns, inverse_t,
                HAS_NEGATIVE_LOG_Q, PRECISION,
            )  # fmt: skip
            p = tl.exp(logits - lse[:, None])
            dq = tl.dot(p.to(k.dtype), k, dq, input_precision=PRECISION)
        positive = _vectors(positive_ptr, rows, stride_positive, is_row, cols, D)
        logit = _positive_logit(
            q, positive, positive_log_q_ptr, rows, is_row, inverse_t, HAS_POSITIVE_LOG_Q
        )
        c = tl.load(dloss_ptr + rows, mask=is_row, other=0.0) * inverse_t
        minus = tl.exp(logit - lse) - 1.0
        dq = c[:, None] * (dq + minus[:, None] * positive.to(tl.float32))
        dpositive = (c * minus)[:, None] * q.to(tl.float32)
        mask = is_row[:, None] & (cols < D)[None, :]
        offs = rows[:, None] * D + cols[None, :]
        tl.store(dquery_ptr + offs, dq.to(dquery_ptr.dtype.element_ty), mask=mask)
        tl.store(dpositive_ptr + offs, dpositive.to(dpositive_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sampled_softmax_bwd_negatives_kernel(
    dloss_ptr,
    query_ptr,
    negative_ptr,
    negative_blocks_ptr,
    query_offsets_ptr,
    negative_offsets_ptr,
    positive_id_ptr,
    negative_id_ptr,
    negative_log_q_ptr,
    lse_ptr,
    dnegative_ptr,
    N,
    stride_query,
    stride_negative,
    inverse_t,
    G,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEPS: tl.constexpr,
    HAS_NEGATIVE_LOG_Q: tl.constexpr,
    PRECISION: tl.constexpr,
):
    group, columns, end = _rows_of_block(
        negative_blocks_ptr, negative_offsets_ptr, G, BLOCK_N, STEPS
    )
    if group < G:
        part = tl.program_id(1).to(tl.int64)
        cols = tl.arange(0, BLOCK_D)
        is_negative = columns < end
        k = _vectors(negative_ptr, columns, stride_negative, is_negative, cols, D)
        ids = tl.load(negative_id_ptr + columns, mask=is_negative, other=0)
        dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        row_start = tl.load(query_offsets_ptr + group)
        row_end = tl.load(query_offsets_ptr + group + 1)
        # Each part takes every num_programs-th block of rows.
        step = BLOCK_R * tl.num_programs(1)
        for first in range(row_start + part * BLOCK_R, row_end, step):
            rows = first + tl.arange(0, BLOCK_R)
            is_row = rows < row_end
            q = _vectors(query_ptr, rows, stride_query, is_row, cols, D)
            row_ids = tl.load(positive_id_ptr + rows, mask=is_row, other=0)
            lse = tl.load(lse_ptr + rows, mask=is_row, other=0.0)
            c = tl.load(dloss_ptr + rows, mask=is_row, other=0.0) * inverse_t
            logits = _logits(
                q, k, row_ids, ids, is_row, is_negative, negative_log_q_ptr, columns, inverse_t,
                HAS_NEGATIVE_LOG_Q, PRECISION,
            )  # fmt: skip
            weight = tl.exp(logits - lse[:, None]) * c[:, None]
            dk = tl.dot(tl.trans(weight.to(q.dtype)), q, dk, input_precision=PRECISION)
        offs = (part * N + columns)[:, None] * D + cols[None, :]
        tl.store(dnegative_ptr + offs, dk, mask=is_negative[:, None] & (cols < D)[None, :])


def sampled_softmax_fwd(
    query: Tensor,
    positive: Tensor,
    negative: Tensor,
    query_offsets: Tensor,
    negative_offsets: Tensor,
    positive_id: Tensor,
    negative_id: Tensor,
    positive_log_q: Tensor | None,
    negative_log_q: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Return loss (R,) and lse (R,), float32. Vectors may have any row stride."""
    R = query.shape[0]
    loss, lse = (query.new_zeros(R, dtype=torch.float32) for _ in range(2))
    G = query_offsets.numel() - 1
    if R == 0 or G == 0:
        return loss, lse
    options = _options(query)
    row_blocks = _blocks(query_offsets, options["BLOCK_R"])
    _sampled_softmax_fwd_kernel[(triton.cdiv(R, options["BLOCK_R"]) + G,)](
        query,
        positive,
        negative,
        row_blocks,
        query_offsets,
        negative_offsets,
        positive_id,
        negative_id,
        positive_log_q,
        negative_log_q,
        loss,
        lse,
        query.stride(0),
        positive.stride(0),
        negative.stride(0),
        1 / temperature,
        G,
        STEPS=G.bit_length(),
        HAS_POSITIVE_LOG_Q=positive_log_q is not None,
        HAS_NEGATIVE_LOG_Q=negative_log_q is not None,
        **options,
    )
    return loss, lse


def sampled_softmax_bwd(
    dloss: Tensor,
    query: Tensor,
    positive: Tensor,
    negative: Tensor,
    query_offsets: Tensor,
    negative_offsets: Tensor,
    positive_id: Tensor,
    negative_id: Tensor,
    positive_log_q: Tensor | None,
    negative_log_q: Tensor | None,
    lse: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dquery, dpositive (R, D) and dnegative (N, D), dtype of query."""
    (R, D), N = query.shape, negative.shape[0]
    dquery, dpositive = query.new_zeros(R, D), query.new_zeros(R, D)
    G = query_offsets.numel() - 1
    if R == 0 or G == 0:
        return dquery, dpositive, query.new_zeros(N, D)
    options = _options(query)
    block_r, block_n = options["BLOCK_R"], options["BLOCK_N"]
    has_negative_log_q = negative_log_q is not None
    _sampled_softmax_bwd_rows_kernel[(triton.cdiv(R, block_r) + G,)](
        dloss,
        query,
        positive,
        negative,
        _blocks(query_offsets, block_r),
        query_offsets,
        negative_offsets,
        positive_id,
        negative_id,
        positive_log_q,
        negative_log_q,
        lse,
        dquery,
        dpositive,
        query.stride(0),
        positive.stride(0),
        negative.stride(0),
        1 / temperature,
        G,
        STEPS=G.bit_length(),
        HAS_POSITIVE_LOG_Q=positive_log_q is not None,
        HAS_NEGATIVE_LOG_Q=has_negative_log_q,
        **options,
    )
    if N == 0:
        return dquery, dpositive, query.new_zeros(N, D)
    # Few negatives leave processors idle: then several programs share the rows of a block.
    blocks = triton.cdiv(N, block_n)
    rows_in_group = triton.cdiv(triton.cdiv(R, G), block_r)
    parts = max(1, min(num_programs(query.device, rows_in_group, 2) // blocks, 64))
    dnegative = query.new_zeros(parts, N, D, dtype=torch.float32)
    _sampled_softmax_bwd_negatives_kernel[(blocks + G, parts)](
        dloss,
        query,
        negative,
        _blocks(negative_offsets, block_n),
        query_offsets,
        negative_offsets,
        positive_id,
        negative_id,
        negative_log_q,
        lse,
        dnegative,
        N,
        query.stride(0),
        negative.stride(0),
        1 / temperature,
        G,
        STEPS=G.bit_length(),
        HAS_NEGATIVE_LOG_Q=has_negative_log_q,
        **options,
    )
    return dquery, dpositive, dnegative.sum(0).to(query.dtype)


def _blocks(offsets: Tensor, block: int) -> Tensor:
    """Return (G + 1,): how many blocks the groups before each one have."""
    counts = (offsets.diff() + block - 1) // block
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _options(query: Tensor) -> dict[str, object]:
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
