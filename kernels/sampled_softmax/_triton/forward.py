"""Forward pass of the sampled softmax: the formulas are in __init__.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.sampled_softmax._triton.groups import (
    blocks_before,
    launch_options,
    load_vectors,
    pair_logits,
    positive_logit,
    rows_of_block,
)


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
    group, rows, row_end = rows_of_block(row_blocks_ptr, query_offsets_ptr, G, BLOCK_R, STEPS)
    if group < G:
        cols = tl.arange(0, BLOCK_D)
        is_row = rows < row_end
        q = load_vectors(query_ptr, rows, stride_query, is_row, cols, D)
        positive = load_vectors(positive_ptr, rows, stride_positive, is_row, cols, D)
        row_ids = tl.load(positive_id_ptr + rows, mask=is_row, other=0)
        logit = positive_logit(
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
            k = load_vectors(negative_ptr, columns, stride_negative, is_negative, cols, D)
            ids = tl.load(negative_id_ptr + columns, mask=is_negative, other=0)
            logits = pair_logits(
                q, k, row_ids, ids, is_row, is_negative, negative_log_q_ptr, columns, inverse_t,
                HAS_NEGATIVE_LOG_Q, PRECISION,
            )  # fmt: skip
            new_top = tl.maximum(top, tl.max(logits, 1))
            total = total * tl.exp(top - new_top) + tl.sum(tl.exp(logits - new_top[:, None]), 1)
            top = new_top
        # Not lse - logit: where the positive is on top, a small loss keeps its digits.
        tl.store(loss_ptr + rows, (top - logit) + tl.log(total), mask=is_row)
        tl.store(lse_ptr + rows, top + tl.log(total), mask=is_row)


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
    options = launch_options(query)
    row_blocks = blocks_before(query_offsets, options["BLOCK_R"])
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
