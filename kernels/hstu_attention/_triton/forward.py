"""Forward kernel: a program computes the output of one block of queries of one head.

Letters: B sequences, L keys, R queries, H heads, K dim of q and k, V dim of v.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.silu import silu
from kernels.hstu_attention._triton.align import aligned, narrowed
from kernels.hstu_attention._triton.launch import kernel_blocks, kernel_constants, kernel_inputs
from kernels.hstu_attention._triton.mask import key_blocks, pick2, pick4, visible
from kernels.hstu_attention._triton.tile import (
    load_rows,
    load_times,
    relative_bias,
    sequence,
    store_rows,
)
from kernels.hstu_attention.structure import Structure


@triton.jit
def _attend(
    q,
    k_base,
    v_base,
    key_first,
    row,
    length,
    history,
    query_time,
    key_start,
    acc,
    row_max,
    row_sum,
    stride_kl,
    stride_vl,
    alpha,
    position_ptr,
    time_ptr,
    threshold_ptr,
    key_time_ptr,
    MASKED: tl.constexpr,
    SOFTMAX: tl.constexpr,
    FAST: tl.constexpr,
    REACH: tl.constexpr,
    NUM_BUCKETS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    NUM_CONTEXT: tl.constexpr,
    CONTEXT: tl.constexpr,
    WINDOW: tl.constexpr,
    GLOBAL_ROWS: tl.constexpr,
    GLOBAL_COLUMNS: tl.constexpr,
):
    """Add one block of keys to the running sums."""
    col = key_first + tl.arange(0, BLOCK_N)
    k = load_rows(k_base, key_first, length, stride_kl, K, BLOCK_N, BLOCK_K)
    score = tl.dot(q, tl.trans(k), input_precision="ieee") * alpha
    if position_ptr is not None:
        key_time = col
        if time_ptr is not None:
            key_time = load_times(key_time_ptr, key_start, key_first, length, BLOCK_N)
        score += relative_bias(
            row[:, None],
            col[None, :],
            history,
            query_time[:, None],
            key_time[None, :],
            position_ptr,
            time_ptr,
            threshold_ptr,
            REACH,
            NUM_BUCKETS,
        )
    if MASKED:
        seen = visible(
            row[:, None],
            col[None, :],
            length,
            history,
            NUM_CONTEXT,
            CONTEXT,
            WINDOW,
            GLOBAL_ROWS,
            GLOBAL_COLUMNS,
        )
    if SOFTMAX:
        if MASKED:
            score = tl.where(seen, score, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(score, 1))
        base = tl.where(new_max == float("-inf"), 0.0, new_max)  # nothing seen yet
        weight = tl.exp(score - base[:, None])
        shrink = tl.exp(row_max - base)
        row_sum = row_sum * shrink + tl.sum(weight, 1)
        acc = acc * shrink[:, None]
        row_max = new_max
    else:
        weight = silu(score, FAST)
        if MASKED:
            weight = tl.where(seen, weight, 0.0)
    v = load_rows(v_base, key_first, length, stride_vl, V, BLOCK_N, BLOCK_V)
    acc = tl.dot(weight.to(v.dtype), v, acc, input_precision="ieee")
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["num_blocks"])
def _hstu_attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    order_ptr,
    offsets_ptr,
    q_offsets_ptr,
    num_candidates_ptr,
    position_ptr,
    time_ptr,
    threshold_ptr,
    query_time_ptr,
    key_time_ptr,
    stride_qr,
    stride_qh,
    stride_kl,
    stride_kh,
    stride_vl,
    stride_vh,
    num_blocks,
    alpha,
    scale,
    SOFTMAX: tl.constexpr,
    FAST: tl.constexpr,
    REACH: tl.constexpr,
    NUM_BUCKETS: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    NUM_CONTEXT: tl.constexpr,
    CONTEXT: tl.constexpr,
    WINDOW: tl.constexpr,
    GLOBAL_ROWS: tl.constexpr,
    GLOBAL_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    block, head, key_start, length, history, q_start, q_len = sequence(
        tl.program_id(0), num_blocks, order_ptr, offsets_ptr, q_offsets_ptr, num_candidates_ptr, H
    )
    query_first = (num_blocks - 1 - block) * BLOCK_M  # the newest rows have most to do: first
    if query_first < q_len:
        k_base = k_ptr + key_start * stride_kl + head * stride_kh
        v_base = v_ptr + key_start * stride_vl + head * stride_vh
        q_base = q_ptr + q_start * stride_qr + head * stride_qh
        q = load_rows(q_base, query_first, q_len, stride_qr, K, BLOCK_M, BLOCK_K)
        row_begin = length - q_len + query_first
        row = row_begin + tl.arange(0, BLOCK_M)
        query_time = row
        if time_ptr is not None:
            query_time = load_times(query_time_ptr, q_start, query_first, q_len, BLOCK_M)
        (
            full0, num_full0, full1, num_full1,
            part0, num_part0, part1, num_part1, part2, num_part2, part3, num_part3,
        ) = key_blocks(
            row_begin,
            tl.minimum(row_begin + BLOCK_M, length),
            history,
            BLOCK_N,
            NUM_CONTEXT,
            CONTEXT,
            WINDOW,
            GLOBAL_ROWS,
            GLOBAL_COLUMNS,
        )  # fmt: skip
        acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        for i in tl.range(0, num_full0 + num_full1, num_stages=STAGES):
            acc, row_max, row_sum = _attend(
                q, k_base, v_base, pick2(i, full0, num_full0, full1) * BLOCK_N,
                row, length, history, query_time, key_start, acc, row_max, row_sum,
                stride_kl, stride_vl, alpha, position_ptr, time_ptr, threshold_ptr, key_time_ptr,
                False, SOFTMAX, FAST, REACH, NUM_BUCKETS, K, V, BLOCK_N, BLOCK_K, BLOCK_V,
                NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS,
            )  # fmt: skip
        for i in tl.range(0, num_part0 + num_part1 + num_part2 + num_part3, num_stages=STAGES):
            part = pick4(i, part0, num_part0, part1, num_part1, part2, num_part2, part3)
            acc, row_max, row_sum = _attend(
                q, k_base, v_base, part * BLOCK_N,
                row, length, history, query_time, key_start, acc, row_max, row_sum,
                stride_kl, stride_vl, alpha, position_ptr, time_ptr, threshold_ptr, key_time_ptr,
                True, SOFTMAX, FAST, REACH, NUM_BUCKETS, K, V, BLOCK_N, BLOCK_K, BLOCK_V,
                NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS,
            )  # fmt: skip
        if SOFTMAX:
            acc = acc / row_sum[:, None]
            rows = query_first + tl.arange(0, BLOCK_M)
            lse_at = lse_ptr + (q_start + rows) * H + head
            tl.store(lse_at, row_max + tl.log(row_sum), mask=rows < q_len)
        else:
            acc = acc * scale
        out_base = out_ptr + q_start * (H * V) + head * V
        store_rows(out_base, query_first, q_len, H * V, acc, V, BLOCK_M, BLOCK_V)


def hstu_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, structure: Structure
) -> tuple[Tensor, Tensor]:
    """Return out (R, H, V) and, with softmax, the log of each row's sum (R, H) float32."""
    R, H, _ = q.shape
    V = v.shape[2]
    q, k, v = aligned(q), aligned(k), aligned(v)
    out = q.new_empty(R, H, v.shape[2])
    lse = q.new_empty((R, H) if structure.softmax else (0,), dtype=torch.float32)
    blocks = kernel_blocks("forward", q, v, structure)
    num_blocks = triton.cdiv(structure.max_q_len, blocks["BLOCK_M"])
    num_programs = num_blocks * structure.num_sequences * H
    if num_programs:
        _hstu_attention_fwd_kernel[(num_programs,)](
            q, k, v, out, lse, *kernel_inputs(structure),
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
            num_blocks, structure.alpha, structure.scale,
            **kernel_constants(q, v, structure), **blocks,
        )  # fmt: skip
    return narrowed(out, V), lse
