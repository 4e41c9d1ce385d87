"""One step of the backward kernel: 64 queries against 64 keys of a warp group, 128 of both.

The formulas and what goes where: backward.py.
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.hstu_attention._hopper.bias import add_time_bias, position_bias, tile_buckets
from kernels.hstu_attention._hopper.bias_gradient import add_bias_grad
from kernels.hstu_attention._hopper.reduce_add import async_reduce_add
from kernels.hstu_attention._hopper.tile import half_score, multiply, tanh
from kernels.hstu_attention._triton.mask import visible_of_columns


@gluon.jit
def add_query_grad(
    dq, dq_desc, staging, query_first, q_start, q_len, column, BOUNDED: gl.constexpr
):
    """Add a tile to dQ; the caller has made sure that `staging` is free. Zero beyond q_len.

    Rows beyond belong to the next sequence. They are zero anyway unless a key of this one holds
    NaN or Inf, so only a step that may follow the last block looks.
    """
    if BOUNDED:
        layout: gl.constexpr = gl.SliceLayout(1, dq.type.layout)
        row = query_first + gl.arange(0, dq.shape[0], layout)
        dq = gl.where((row < q_len)[:, None], dq, 0.0)
    staging.store(dq)
    fence_async_shared()
    gl.thread_barrier()
    async_reduce_add(dq_desc, [q_start + query_first, column], staging)


@gluon.jit
def backward_step(
    HALF: gl.constexpr, it, k_w, v_w, k_columns, q_s, dout_s, ds_s, dq_s, dq_desc,
    q_full, dout_full, q_empty, dout_empty, ds_full, ds_empty, dk, dv, no_score, no_dq,
    query_first, last_first, q_start, q_len, length, history,
    key_first, key_time, time_first, time_last, closest, b, column,
    position_ptr, time_ptr, threshold_ptr, query_time_ptr, query_span_ptr,
    position_grad_ptr, time_grad_ptr, half_alpha,
    NUM_BUCKETS: gl.constexpr, CANDIDATES: gl.constexpr, FIRST: gl.constexpr, MASKED: gl.constexpr,
    QUERY_GRAD: gl.constexpr, KEY_GRAD: gl.constexpr, VALUE_GRAD: gl.constexpr,
    NUM_CONTEXT: gl.constexpr, CONTEXT: gl.constexpr, WINDOW: gl.constexpr,
    GLOBAL_ROWS: gl.constexpr, GLOBAL_COLUMNS: gl.constexpr,
):  # fmt: skip
    """Add what one block of queries gives to dK and dV, and send the dQ of the last one."""
    dtype: gl.constexpr = q_s.dtype
    STAGES: gl.constexpr = q_s.shape[0]
    BLOCK_M: gl.constexpr = q_s.shape[1]
    ROWS: gl.constexpr = k_w.shape[0]
    score_layout: gl.constexpr = no_score.type.layout
    key_operand: gl.constexpr = gl.DotOperandLayout(0, dk.type.layout, 2)
    value_operand: gl.constexpr = gl.DotOperandLayout(0, dv.type.layout, 2)
    DOUT_STAGES: gl.constexpr = dout_s.shape[0]
    stage = it % STAGES
    dout_stage = it % DOUT_STAGES
    dout = dout_s.index(dout_stage)
    row = length - q_len + query_first + gl.arange(0, BLOCK_M, gl.SliceLayout(0, score_layout))
    col = key_first + gl.arange(0, ROWS, gl.SliceLayout(1, score_layout))
    low = 0
    high = 0
    query_times = 0
    if time_ptr is not None:
        low, high = tile_buckets(
            time_first, time_last, closest, query_span_ptr, q_start, b, query_first, NUM_BUCKETS
        )
        # The columns of the tile are queries, numbered as rows of the sequence.
        query_times = query_time_ptr + q_start - (length - q_len)
    # A bias by time takes so many registers that all bias is there before S, and dP comes after it.
    if time_ptr is not None:
        bias = position_bias(
            position_ptr, key_first, col, length - q_len + query_first, row, history, 1, CANDIDATES
        )
        bias = add_time_bias(
            bias, key_time, query_times, row, low, high, time_ptr, threshold_ptr
        )  # fmt: skip
    mbarrier.wait(q_full.index(stage), (it // STAGES) & 1)
    product = warpgroup_mma(
        k_w, q_s.index(stage).permute((1, 0)), no_score, use_acc=False, is_async=True
    )
    mbarrier.wait(dout_full.index(dout_stage), (it // DOUT_STAGES) & 1)
    if KEY_GRAD and time_ptr is None:
        dweight = warpgroup_mma(v_w, dout.permute((1, 0)), no_score, use_acc=False, is_async=True)
    if time_ptr is None:
        bias = position_bias(
            position_ptr, key_first, col, length - q_len + query_first, row, history, 1, CANDIDATES
        )
    product = warpgroup_mma_wait(1 if KEY_GRAD and time_ptr is None else 0, deps=[product])
    half = half_score(product, half_alpha, bias, position_ptr is not None)
    if KEY_GRAD and time_ptr is not None:
        dweight = warpgroup_mma(v_w, dout.permute((1, 0)), no_score, use_acc=False, is_async=True)
    t = tanh(half)
    weight = gl.fma(half, t, half)
    slope = gl.fma(t, 1.0 - weight, 1.0 + weight)  # twice the derivative of silu
    if MASKED:
        seen = visible_of_columns(
            row[None, :], col[:, None], length, history,
            NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS, CANDIDATES,
        )  # fmt: skip
        weight = gl.where(seen, weight, 0.0)
    if VALUE_GRAD:
        weight = gl.convert_layout(weight.to(dtype), value_operand)
        dv_sum = warpgroup_mma(weight, dout, dv, is_async=True)
    if KEY_GRAD:
        dweight = warpgroup_mma_wait(1 if VALUE_GRAD else 0, deps=[dweight])
        if DOUT_STAGES != STAGES:
            mbarrier.arrive(dout_empty.index(dout_stage))
        dscore = multiply(dweight, slope)
        if MASKED:
            dscore = gl.where(seen, dscore, 0.0)
        rounded = dscore.to(dtype)
        dk_sum = warpgroup_mma(
            gl.convert_layout(rounded, key_operand), q_s.index(stage), dk, is_async=True
        )
    new = it & 1
    old = 1 - new
    if QUERY_GRAD:
        mbarrier.wait(ds_empty.index(new), ((it >> 1) & 1) ^ 1)
        ds_s.index(new).slice(HALF * ROWS, ROWS, dim=0).store(rounded)
        fence_async_shared()
        tma.store_wait(1)  # every sum but the newest has read its staging buffer: `new` is free
        gl.thread_barrier()
        mbarrier.arrive(ds_full.index(new), count=1)
    BIAS_GRAD: gl.constexpr = KEY_GRAD and position_grad_ptr is not None
    LAST: gl.constexpr = FIRST or BIAS_GRAD or not QUERY_GRAD
    if LAST:
        if KEY_GRAD and VALUE_GRAD:
            dv, dk = warpgroup_mma_wait(0, deps=[dv_sum, dk_sum])
        elif KEY_GRAD:
            dk = warpgroup_mma_wait(0, deps=[dk_sum])
        else:
            dv = warpgroup_mma_wait(0, deps=[dv_sum])
        mbarrier.arrive(q_empty.index(stage))
    if BIAS_GRAD:  # after the products, which hold their operands in registers
        add_bias_grad(
            dscore, position_grad_ptr, time_grad_ptr, key_first, col,
            length - q_len + query_first, row, history, key_time, query_times,
            low, high, threshold_ptr, CANDIDATES,
        )  # fmt: skip
    if QUERY_GRAD and not FIRST:
        mbarrier.wait(ds_full.index(old), ((it - 1) >> 1) & 1)
        dq_sum = warpgroup_mma(
            ds_s.index(old).permute((1, 0)), k_columns, no_dq, use_acc=False, is_async=True
        )
        if not LAST:
            dv, dk = warpgroup_mma_wait(1, deps=[dv_sum, dk_sum])
            mbarrier.arrive(q_empty.index(stage))
        dq = warpgroup_mma_wait(0, deps=[dq_sum])
        mbarrier.arrive(ds_empty.index(old))
        add_query_grad(
            dq, dq_desc, dq_s.index(HALF * 2 + new), last_first, q_start, q_len, column, MASKED
        )
    return dk, dv
