"""Backward kernels: dQ by block of queries, then dK and dV by block of keys, each in float32.

    P = weights, dP = dO V^T
    silu:     dS = dP * silu'(S) * scale,  dV = P^T dO * scale
    softmax:  dS = P * (dP - rowsum(dO * O)),  dV = P^T dO
    dQ = alpha * dS K,  dK = alpha * dS^T Q,  d bias = dS

The constant factors are applied once, to the sums.

Letters: B sequences, L keys, R queries, H heads, K dim of q and k, V dim of v.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.hstu_attention._triton.align import aligned, narrowed
from kernels.hstu_attention._triton.bias_gradient import bias_gradient
from kernels.hstu_attention._triton.launch import kernel_blocks, kernel_constants, kernel_inputs
from kernels.hstu_attention._triton.mask import key_blocks, pick2, pick4, query_blocks, visible
from kernels.hstu_attention._triton.tile import (
    load_rows,
    load_times,
    relative_bias,
    sequence,
    silu_and_slope,
    store_rows,
)
from kernels.hstu_attention.structure import Structure


@triton.jit
def _weight_and_slope(
    score,
    row,
    col,
    length,
    history,
    query_time,
    key_time,
    lse,
    position_ptr,
    time_ptr,
    threshold_ptr,
    MASKED: tl.constexpr,
    SOFTMAX: tl.constexpr,
    FAST: tl.constexpr,
    REACH: tl.constexpr,
    NUM_BUCKETS: tl.constexpr,
    NUM_CONTEXT: tl.constexpr,
    CONTEXT: tl.constexpr,
    WINDOW: tl.constexpr,
    GLOBAL_ROWS: tl.constexpr,
    GLOBAL_COLUMNS: tl.constexpr,
):
    """Return P and what dP is multiplied with; row, col, times and lse broadcast to the tile."""
    if position_ptr is not None:
        score += relative_bias(
            row, col, history, query_time, key_time,
            position_ptr, time_ptr, threshold_ptr, REACH, NUM_BUCKETS,
        )  # fmt: skip
    if SOFTMAX:
        weight = tl.exp(score - lse)
        slope = weight
    else:
        weight, slope = silu_and_slope(score, FAST)
    if MASKED:
        seen = visible(
            row, col, length, history,
            NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS,
        )  # fmt: skip
        weight = tl.where(seen, weight, 0.0)
        slope = tl.where(seen, slope, 0.0)
    return weight, slope


@triton.jit
def _query_step(
    q, dout, k_base, v_base, key_first, row, length, history, query_time, key_start, lse, delta, dq,
    stride_kl, stride_vl, alpha, position_ptr, time_ptr, threshold_ptr, key_time_ptr,
    MASKED: tl.constexpr, SOFTMAX: tl.constexpr, FAST: tl.constexpr,
    REACH: tl.constexpr, NUM_BUCKETS: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    NUM_CONTEXT: tl.constexpr, CONTEXT: tl.constexpr, WINDOW: tl.constexpr,
    GLOBAL_ROWS: tl.constexpr, GLOBAL_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add what one block of keys gives to dQ."""
    col = key_first + tl.arange(0, BLOCK_N)
    key_time = col
    if time_ptr is not None:
        key_time = load_times(key_time_ptr, key_start, key_first, length, BLOCK_N)
    k = load_rows(k_base, key_first, length, stride_kl, K, BLOCK_N, BLOCK_K)
    v = load_rows(v_base, key_first, length, stride_vl, V, BLOCK_N, BLOCK_V)
    score = tl.dot(q, tl.trans(k), input_precision="ieee") * alpha
    dweight = tl.dot(dout, tl.trans(v), input_precision="ieee")
    _, slope = _weight_and_slope(
        score, row[:, None], col[None, :], length, history,
        query_time[:, None], key_time[None, :], lse[:, None], position_ptr, time_ptr, threshold_ptr,
        MASKED, SOFTMAX, FAST, REACH, NUM_BUCKETS,
        NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS,
    )  # fmt: skip
    if SOFTMAX:
        dweight -= delta[:, None]
    return tl.dot((dweight * slope).to(k.dtype), k, dq, input_precision="ieee")


@triton.jit(do_not_specialize=["num_blocks"])
def _query_grad_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr,
    order_ptr, offsets_ptr, q_offsets_ptr, num_candidates_ptr,
    position_ptr, time_ptr, threshold_ptr, query_time_ptr, key_time_ptr,
    stride_qr, stride_qh, stride_kl, stride_kh, stride_vl, stride_vh, num_blocks, alpha, scale,
    SOFTMAX: tl.constexpr, FAST: tl.constexpr, REACH: tl.constexpr, NUM_BUCKETS: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    NUM_CONTEXT: tl.constexpr, CONTEXT: tl.constexpr, WINDOW: tl.constexpr,
    GLOBAL_ROWS: tl.constexpr, GLOBAL_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    block, head, key_start, length, history, q_start, q_len = sequence(
        tl.program_id(0), num_blocks, order_ptr, offsets_ptr, q_offsets_ptr, num_candidates_ptr, H
    )
    query_first = (num_blocks - 1 - block) * BLOCK_M  # the newest rows have most to do: first
    if query_first < q_len:
        k_base = k_ptr + key_start * stride_kl + head * stride_kh
        v_base = v_ptr + key_start * stride_vl + head * stride_vh
        q_base = q_ptr + q_start * stride_qr + head * stride_qh
        out_at = q_start * (H * V) + head * V
        q = load_rows(q_base, query_first, q_len, stride_qr, K, BLOCK_M, BLOCK_K)
        dout = load_rows(dout_ptr + out_at, query_first, q_len, H * V, V, BLOCK_M, BLOCK_V)
        rows = query_first + tl.arange(0, BLOCK_M)
        lse = tl.zeros([BLOCK_M], tl.float32)
        delta = tl.zeros([BLOCK_M], tl.float32)
        if SOFTMAX:
            out = load_rows(out_ptr + out_at, query_first, q_len, H * V, V, BLOCK_M, BLOCK_V)
            delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
            tl.store(delta_ptr + (q_start + rows) * H + head, delta, mask=rows < q_len)
            lse = tl.load(lse_ptr + (q_start + rows) * H + head, mask=rows < q_len, other=0.0)
        row_begin = length - q_len + query_first
        row = row_begin + tl.arange(0, BLOCK_M)
        query_time = row
        if time_ptr is not None:
            query_time = load_times(query_time_ptr, q_start, query_first, q_len, BLOCK_M)
        (
            full0, num_full0, full1, num_full1,
            part0, num_part0, part1, num_part1, part2, num_part2, part3, num_part3,
        ) = key_blocks(
            row_begin, tl.minimum(row_begin + BLOCK_M, length), history, BLOCK_N,
            NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS,
        )  # fmt: skip
        dq = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        for i in tl.range(0, num_full0 + num_full1, num_stages=STAGES):
            dq = _query_step(
                q, dout, k_base, v_base, pick2(i, full0, num_full0, full1) * BLOCK_N,
                row, length, history, query_time, key_start, lse, delta, dq,
                stride_kl, stride_vl, alpha, position_ptr, time_ptr, threshold_ptr, key_time_ptr,
                False, SOFTMAX, FAST, REACH, NUM_BUCKETS, K, V, BLOCK_N, BLOCK_K, BLOCK_V,
                NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS,
            )  # fmt: skip
        for i in tl.range(0, num_part0 + num_part1 + num_part2 + num_part3, num_stages=STAGES):
            part = pick4(i, part0, num_part0, part1, num_part1, part2, num_part2, part3)
            dq = _query_step(
                q, dout, k_base, v_base, part * BLOCK_N,
                row, length, history, query_time, key_start, lse, delta, dq,
                stride_kl, stride_vl, alpha, position_ptr, time_ptr, threshold_ptr, key_time_ptr,
                True, SOFTMAX, FAST, REACH, NUM_BUCKETS, K, V, BLOCK_N, BLOCK_K, BLOCK_V,
                NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS,
            )  # fmt: skip
        dq_base = dq_ptr + q_start * (H * K) + head * K
        store_rows(dq_base, query_first, q_len, H * K, dq * (alpha * scale), K, BLOCK_M, BLOCK_K)


@triton.jit
def _key_step(
    k, v, q_base, dout_base, lse_ptr, delta_ptr, query_first, q_len, col, length, history,
    key_time, q_start, head, dk, dv,
    stride_qr, alpha, position_ptr, time_ptr, threshold_ptr, query_time_ptr,
    MASKED: tl.constexpr, SOFTMAX: tl.constexpr, FAST: tl.constexpr,
    REACH: tl.constexpr, NUM_BUCKETS: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    NUM_CONTEXT: tl.constexpr, CONTEXT: tl.constexpr, WINDOW: tl.constexpr,
    GLOBAL_ROWS: tl.constexpr, GLOBAL_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add what one block of queries gives to dK and dV. Tiles are (keys, queries)."""
    rows = query_first + tl.arange(0, BLOCK_M)
    row = length - q_len + rows
    query_time = row
    if time_ptr is not None:
        query_time = load_times(query_time_ptr, q_start, query_first, q_len, BLOCK_M)
    lse = tl.zeros([BLOCK_M], tl.float32)
    if SOFTMAX:
        lse = tl.load(lse_ptr + (q_start + rows) * H + head, mask=rows < q_len, other=0.0)
    # Rows past the last query are zero in q and dout, and add nothing.
    q = load_rows(q_base, query_first, q_len, stride_qr, K, BLOCK_M, BLOCK_K)
    dout = load_rows(dout_base, query_first, q_len, H * V, V, BLOCK_M, BLOCK_V)
    score = tl.dot(k, tl.trans(q), input_precision="ieee") * alpha
    weight, slope = _weight_and_slope(
        score, row[None, :], col[:, None], length, history,
        query_time[None, :], key_time[:, None], lse[None, :], position_ptr, time_ptr, threshold_ptr,
        MASKED, SOFTMAX, FAST, REACH, NUM_BUCKETS,
        NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS,
    )  # fmt: skip
    dv = tl.dot(weight.to(dout.dtype), dout, dv, input_precision="ieee")
    dweight = tl.dot(v, tl.trans(dout), input_precision="ieee")
    if SOFTMAX:
        delta = tl.load(delta_ptr + (q_start + rows) * H + head, mask=rows < q_len, other=0.0)
        dweight -= delta[None, :]
    dk = tl.dot((dweight * slope).to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["num_blocks"])
def _key_grad_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    order_ptr, offsets_ptr, q_offsets_ptr, num_candidates_ptr,
    position_ptr, time_ptr, threshold_ptr, query_time_ptr, key_time_ptr,
    stride_qr, stride_qh, stride_kl, stride_kh, stride_vl, stride_vh, num_blocks, alpha, scale,
    SOFTMAX: tl.constexpr, FAST: tl.constexpr, REACH: tl.constexpr, NUM_BUCKETS: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    NUM_CONTEXT: tl.constexpr, CONTEXT: tl.constexpr, WINDOW: tl.constexpr,
    GLOBAL_ROWS: tl.constexpr, GLOBAL_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    block, head, key_start, length, history, q_start, q_len = sequence(
        tl.program_id(0), num_blocks, order_ptr, offsets_ptr, q_offsets_ptr, num_candidates_ptr, H
    )
    key_first = block * BLOCK_N  # the oldest keys are seen by most rows: first
    if key_first < length:
        k_base = k_ptr + key_start * stride_kl + head * stride_kh
        v_base = v_ptr + key_start * stride_vl + head * stride_vh
        q_base = q_ptr + q_start * stride_qr + head * stride_qh
        dout_base = dout_ptr + q_start * (H * V) + head * V
        k = load_rows(k_base, key_first, length, stride_kl, K, BLOCK_N, BLOCK_K)
        v = load_rows(v_base, key_first, length, stride_vl, V, BLOCK_N, BLOCK_V)
        col = key_first + tl.arange(0, BLOCK_N)
        key_time = col
        if time_ptr is not None:
            key_time = load_times(key_time_ptr, key_start, key_first, length, BLOCK_N)
        (
            full0, num_full0, full1, num_full1,
            part0, num_part0, part1, num_part1, part2, num_part2, part3, num_part3,
        ) = query_blocks(
            key_first, tl.minimum(key_first + BLOCK_N, length), length, history, length - q_len,
            BLOCK_M, NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS,
        )  # fmt: skip
        dk = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        # In this order: with the masked blocks first, ptxas runs every wgmma on its own (C7515).
        for i in tl.range(0, num_full0 + num_full1, num_stages=STAGES):
            dk, dv = _key_step(
                k, v, q_base, dout_base, lse_ptr, delta_ptr,
                pick2(i, full0, num_full0, full1) * BLOCK_M, q_len, col, length,
                history, key_time, q_start, head, dk, dv,
                stride_qr, alpha, position_ptr, time_ptr, threshold_ptr, query_time_ptr,
                False, SOFTMAX, FAST, REACH, NUM_BUCKETS, H, K, V, BLOCK_M, BLOCK_K, BLOCK_V,
                NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS,
            )  # fmt: skip
        for i in tl.range(0, num_part0 + num_part1 + num_part2 + num_part3, num_stages=STAGES):
            part = pick4(i, part0, num_part0, part1, num_part1, part2, num_part2, part3)
            dk, dv = _key_step(
                k, v, q_base, dout_base, lse_ptr, delta_ptr, part * BLOCK_M, q_len, col, length,
                history, key_time, q_start, head, dk, dv,
                stride_qr, alpha, position_ptr, time_ptr, threshold_ptr, query_time_ptr,
                True, SOFTMAX, FAST, REACH, NUM_BUCKETS, H, K, V, BLOCK_M, BLOCK_K, BLOCK_V,
                NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS,
            )  # fmt: skip
        dk_base = dk_ptr + key_start * (H * K) + head * K
        dv_base = dv_ptr + key_start * (H * V) + head * V
        store_rows(dk_base, key_first, length, H * K, dk * (alpha * scale), K, BLOCK_N, BLOCK_K)
        store_rows(dv_base, key_first, length, H * V, dv * scale, V, BLOCK_N, BLOCK_V)


def hstu_attention_bwd(
    dout: Tensor,
    out: Tensor | None,
    lse: Tensor,
    needs_bias_grad: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    structure: Structure,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and both tables (empty where not needed).

    Args:
        dout: (R, H, V) contiguous.
        out: result of the forward pass with softmax, else None.
        lse: as the forward pass returned it.
        needs_bias_grad: whether to compute the gradients of the tables.
        q: as in the forward pass, like the rest.
        k: likewise.
        v: likewise.
        structure: likewise.
    """
    K, V = q.shape[2], v.shape[2]
    q, k, v, dout = aligned(q), aligned(k), aligned(v), aligned(dout)
    if out is not None:
        out = aligned(out)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    delta = torch.empty_like(lse)
    inputs = kernel_inputs(structure)
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    constants = kernel_constants(q, v, structure)
    heads = structure.num_sequences * q.shape[1]

    # The pass over queries leaves delta for the others.
    blocks = kernel_blocks("query_grad", q, v, structure)
    num_blocks = triton.cdiv(structure.max_q_len, blocks["BLOCK_M"])
    if num_blocks * heads:
        _query_grad_kernel[(num_blocks * heads,)](
            q, k, v, out, dout, lse, delta, dq, *inputs, *strides,
            num_blocks, structure.alpha, structure.scale, **constants, **blocks,
        )  # fmt: skip
    blocks = kernel_blocks("key_grad", q, v, structure)
    num_blocks = triton.cdiv(structure.max_len, blocks["BLOCK_N"])
    if num_blocks * heads:
        _key_grad_kernel[(num_blocks * heads,)](
            q, k, v, dout, lse, delta, dk, dv, *inputs, *strides,
            num_blocks, structure.alpha, structure.scale, **constants, **blocks,
        )  # fmt: skip
    dposition, dtime = q.new_empty(0), q.new_empty(0)
    if needs_bias_grad:
        dposition, dtime = bias_gradient(dout, lse, delta, q, k, v, structure)
    return narrowed(dq, K), narrowed(dk, K), narrowed(dv, V), dposition, dtime
