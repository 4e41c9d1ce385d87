"""Backward pass of the sampled softmax: the formulas are in __init__.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.rows import num_programs
from kernels.sampled_softmax._triton.groups import (
    blocks_before,
    launch_options,
    load_vectors,
    pair_logits,
    rows_of_block,
)


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
    negative_log_q_ptr,
    loss_ptr,
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
    HAS_NEGATIVE_LOG_Q: tl.constexpr,
    PRECISION: tl.constexpr,
):
    group, rows, row_end = rows_of_block(row_blocks_ptr, query_offsets_ptr, G, BLOCK_R, STEPS)
    if group < G:
        cols = tl.arange(0, BLOCK_D)
        is_row = rows < row_end
        q = load_vectors(query_ptr, rows, stride_query, is_row, cols, D)
        row_ids = tl.load(positive_id_ptr + rows, mask=is_row, other=0)
        lse = tl.load(lse_ptr + rows, mask=is_row, other=0.0)
        dq = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        others = tl.zeros((BLOCK_R,), tl.float32)
        start = tl.load(negative_offsets_ptr + group)
        end = tl.load(negative_offsets_ptr + group + 1)
        for first in range(start, end, BLOCK_N):
            columns = first + tl.arange(0, BLOCK_N)
            is_negative = columns < end
            k = load_vectors(negative_ptr, columns, stride_negative, is_negative, cols, D)
            ids = tl.load(negative_id_ptr + columns, mask=is_negative, other=0)
            logits = pair_logits(
                q, k, row_ids, ids, is_row, is_negative, negative_log_q_ptr, columns, inverse_t,
                HAS_NEGATIVE_LOG_Q, PRECISION,
            )  # fmt: skip
            p = tl.exp(logits - lse[:, None])
            dq = tl.dot(p.to(k.dtype), k, dq, input_precision=PRECISION)
            others += tl.sum(p, 1)
        positive = load_vectors(positive_ptr, rows, stride_positive, is_row, cols, D)
        c = tl.load(dloss_ptr + rows, mask=is_row, other=0.0) * inverse_t
        # 1 less the positive's probability, of float32 numbers, is rounding where that is nearly 1:
        # optimizers that divide by a gradient's size would step by it. Elsewhere it is the better
        # one, for the sum has the rounding of lse in every term: 5e-4 where logits are thousands.
        loss = tl.load(loss_ptr + rows, mask=is_row, other=0.0)
        others = tl.where(others < 0.5, others, 1.0 - tl.exp(-loss))
        dq = c[:, None] * (dq - others[:, None] * positive.to(tl.float32))
        dpositive = -(c * others)[:, None] * q.to(tl.float32)
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
    group, columns, end = rows_of_block(
        negative_blocks_ptr, negative_offsets_ptr, G, BLOCK_N, STEPS
    )
    if group < G:
        part = tl.program_id(1).to(tl.int64)
        cols = tl.arange(0, BLOCK_D)
        is_negative = columns < end
        k = load_vectors(negative_ptr, columns, stride_negative, is_negative, cols, D)
        ids = tl.load(negative_id_ptr + columns, mask=is_negative, other=0)
        dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        row_start = tl.load(query_offsets_ptr + group)
        row_end = tl.load(query_offsets_ptr + group + 1)
        # Each part takes every num_programs-th block of rows.
        step = BLOCK_R * tl.num_programs(1)
        for first in range(row_start + part * BLOCK_R, row_end, step):
            rows = first + tl.arange(0, BLOCK_R)
            is_row = rows < row_end
            q = load_vectors(query_ptr, rows, stride_query, is_row, cols, D)
            row_ids = tl.load(positive_id_ptr + rows, mask=is_row, other=0)
            lse = tl.load(lse_ptr + rows, mask=is_row, other=0.0)
            c = tl.load(dloss_ptr + rows, mask=is_row, other=0.0) * inverse_t
            logits = pair_logits(
                q, k, row_ids, ids, is_row, is_negative, negative_log_q_ptr, columns, inverse_t,
                HAS_NEGATIVE_LOG_Q, PRECISION,
            )  # fmt: skip
            weight = tl.exp(logits - lse[:, None]) * c[:, None]
            dk = tl.dot(tl.trans(weight.to(q.dtype)), q, dk, input_precision=PRECISION)
        offs = (part * N + columns)[:, None] * D + cols[None, :]
        tl.store(dnegative_ptr + offs, dk, mask=is_negative[:, None] & (cols < D)[None, :])


def sampled_softmax_bwd(
    dloss: Tensor,
    query: Tensor,
    positive: Tensor,
    negative: Tensor,
    query_offsets: Tensor,
    negative_offsets: Tensor,
    positive_id: Tensor,
    negative_id: Tensor,
    negative_log_q: Tensor | None,
    loss: Tensor,
    lse: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dquery, dpositive (R, D) and dnegative (N, D), dtype of query."""
    (R, D), N = query.shape, negative.shape[0]
    dquery, dpositive = query.new_zeros(R, D), query.new_zeros(R, D)
    G = query_offsets.numel() - 1
    if R == 0 or G == 0:
        return dquery, dpositive, query.new_zeros(N, D)
    options = launch_options(query)
    block_r, block_n = options["BLOCK_R"], options["BLOCK_N"]
    has_negative_log_q = negative_log_q is not None
    _sampled_softmax_bwd_rows_kernel[(triton.cdiv(R, block_r) + G,)](
        dloss,
        query,
        positive,
        negative,
        blocks_before(query_offsets, block_r),
        query_offsets,
        negative_offsets,
        positive_id,
        negative_id,
        negative_log_q,
        loss,
        lse,
        dquery,
        dpositive,
        query.stride(0),
        positive.stride(0),
        negative.stride(0),
        1 / temperature,
        G,
        STEPS=G.bit_length(),
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
        blocks_before(negative_offsets, block_n),
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
