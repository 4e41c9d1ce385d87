"""Backward kernel: 128 keys of one head a program, 64 in each of two consumer warp groups.

    S^T = K Q^T,  P = silu(S),  dP^T = V dO^T,  dS = dP * silu'(S)
    dV = scale * P^T dO,  dK = alpha * scale * dS^T Q,  dQ = alpha * scale * dS K

A producer warp copies the keys and values once and blocks of 64 queries into a ring. Scores stand
transposed, keys by queries, so that P^T and dS^T multiply dO and Q out of registers; sums of dK and
dV stay there too. For dQ both groups write dS^T to shared memory; one step later each multiplies it
with half of the columns of K and has the copy engine add the result, in float32, to a buffer in
global memory. These sums have no fixed order: where the same bits are wanted, QUERY_GRAD is False
and query_backward.py computes dQ in a pass of its own. Sums of dK and dV of 256 columns do not fit
the registers together: KEY_GRAD and VALUE_GRAD then come in a pass each, and dQ in its own.

Letters: B sequences, L keys, R queries, H heads, K dim of q and k, V dim of v.
"""

import torch
import triton
import triton.experimental.gluon.language as gl
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.hstu_attention._hopper.bias import (
    add_time_bias,
    bias_inputs,
    load_closest,
    load_span,
    load_times,
    position_bias,
    tile_buckets,
)
from kernels.hstu_attention._hopper.bias_gradient import (
    REPLICAS,
    BiasGradients,
    add_bias_grad,
    bias_gradients,
    table_gradients,
)
from kernels.hstu_attention._hopper.launch import kernel_constants, launch, tiles
from kernels.hstu_attention._hopper.prepare import Tails, prepare
from kernels.hstu_attention._hopper.query_backward import TAIL, query_gradient
from kernels.hstu_attention._hopper.reduce_add import async_reduce_add
from kernels.hstu_attention._hopper.tile import (
    full_block,
    half_score,
    multiply,
    part_block,
    sequence,
    store_rows,
    tanh,
    visiting_queries,
)
from kernels.hstu_attention._triton.bias_gradient import bias_gradient
from kernels.hstu_attention._triton.mask import visible_of_columns
from kernels.hstu_attention.structure import Structure

BLOCK_M = 64
BLOCK_N = TAIL.value


@gluon.jit
def _produce(
    q_desc, q_tail_desc, dout_desc, dout_tail_desc, k_desc, k_tail_desc, v_desc, v_tail_desc,
    q_s, dout_s, k_s, v_s, kv_full, q_full, dout_full, q_empty, dout_empty,
    order_ptr, offsets_ptr, q_offsets_ptr, num_candidates_ptr, num_blocks,
    KEY_GRAD: gl.constexpr, H: gl.constexpr,
    NUM_CONTEXT: gl.constexpr, CONTEXT: gl.constexpr, WINDOW: gl.constexpr,
    GLOBAL_ROWS: gl.constexpr, GLOBAL_COLUMNS: gl.constexpr,
):  # fmt: skip
    BLOCK_M: gl.constexpr = q_s.shape[1]
    BLOCK_N: gl.constexpr = k_s.shape[0]
    K: gl.constexpr = k_s.shape[1]
    V: gl.constexpr = dout_s.shape[2]
    STAGES: gl.constexpr = q_s.shape[0]
    DOUT_STAGES: gl.constexpr = dout_s.shape[0]
    block, head, b, key_start, length, history, q_start, q_len = sequence(
        num_blocks, order_ptr, offsets_ptr, q_offsets_ptr, num_candidates_ptr, H, False,
    )  # fmt: skip
    key_first = block * BLOCK_N
    if key_first < length:
        if KEY_GRAD:
            mbarrier.expect(kv_full, k_desc.block_type.nbytes + v_desc.block_type.nbytes)
        else:
            mbarrier.expect(kv_full, k_desc.block_type.nbytes)
        if key_first + BLOCK_N > length:
            tma.async_copy_global_to_shared(k_tail_desc, [b * BLOCK_N, head * K], kv_full, k_s)
            if KEY_GRAD:
                tma.async_copy_global_to_shared(v_tail_desc, [b * BLOCK_N, head * V], kv_full, v_s)
        else:
            at = key_start + key_first
            tma.async_copy_global_to_shared(k_desc, [at, head * K], kv_full, k_s)
            if KEY_GRAD:
                tma.async_copy_global_to_shared(v_desc, [at, head * V], kv_full, v_s)
        num_part, num_full, full0, n0, full1, part0, m0, part1, m1, part2, m2, part3 = (
            visiting_queries(
                key_first, gl.minimum(key_first + BLOCK_N, length), length, history, length - q_len,
                BLOCK_M, NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS,
            )
        )  # fmt: skip
        for i in range(num_full + num_part):
            j = part_block(i - num_full, part0, m0, part1, m1, part2, m2, part3)
            if i < num_full:
                j = full_block(i, full0, n0, full1)
            stage = i % STAGES
            dout_stage = i % DOUT_STAGES
            mbarrier.wait(q_empty.index(stage), ((i // STAGES) & 1) ^ 1)
            mbarrier.expect(q_full.index(stage), q_desc.block_type.nbytes)
            at = q_start + j * BLOCK_M
            if (j + 1) * BLOCK_M > q_len:
                tma.async_copy_global_to_shared(
                    q_tail_desc, [b * BLOCK_M, head * K], q_full.index(stage), q_s.index(stage)
                )
            else:
                tma.async_copy_global_to_shared(
                    q_desc, [at, head * K], q_full.index(stage), q_s.index(stage)
                )
            if DOUT_STAGES != STAGES:  # else freed with q
                mbarrier.wait(dout_empty.index(dout_stage), ((i // DOUT_STAGES) & 1) ^ 1)
            mbarrier.expect(dout_full.index(dout_stage), dout_desc.block_type.nbytes)
            if (j + 1) * BLOCK_M > q_len:
                tma.async_copy_global_to_shared(
                    dout_tail_desc, [b * BLOCK_M, head * V],
                    dout_full.index(dout_stage), dout_s.index(dout_stage),
                )  # fmt: skip
            else:
                tma.async_copy_global_to_shared(
                    dout_desc, [at, head * V],
                    dout_full.index(dout_stage), dout_s.index(dout_stage),
                )  # fmt: skip


@gluon.jit
def _add_query_grad(
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
def _step(
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
        _add_query_grad(
            dq, dq_desc, dq_s.index(HALF * 2 + new), last_first, q_start, q_len, column, MASKED
        )
    return dk, dv


@gluon.jit
def _consume(
    HALF: gl.constexpr, dq_desc, dk_desc, dv_desc, dk_ptr, dv_ptr, stride_dk, stride_dv,
    q_s, dout_s, k_s, v_s, ds_s, dq_s,
    kv_full, q_full, dout_full, q_empty, dout_empty, ds_full, ds_empty,
    order_ptr, offsets_ptr, q_offsets_ptr, num_candidates_ptr, num_blocks,
    position_ptr, time_ptr, threshold_ptr, query_time_ptr, key_time_ptr, query_span_ptr,
    key_span_ptr, closest_ptr, position_grad_ptr, time_grad_ptr,
    half_alpha, key_scale, value_scale, NUM_BUCKETS: gl.constexpr,
    QUERY_GRAD: gl.constexpr, KEY_GRAD: gl.constexpr, VALUE_GRAD: gl.constexpr, H: gl.constexpr,
    NUM_CONTEXT: gl.constexpr, CONTEXT: gl.constexpr, WINDOW: gl.constexpr,
    GLOBAL_ROWS: gl.constexpr, GLOBAL_COLUMNS: gl.constexpr,
):  # fmt: skip
    """Compute dK and dV of one half of the keys, and half of the columns of dQ."""
    dtype: gl.constexpr = q_s.dtype
    BLOCK_M: gl.constexpr = q_s.shape[1]
    BLOCK_N: gl.constexpr = k_s.shape[0]
    ROWS: gl.constexpr = BLOCK_N // 2
    K: gl.constexpr = k_s.shape[1]
    V: gl.constexpr = dout_s.shape[2]
    STAGES: gl.constexpr = q_s.shape[0]
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    key_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    value_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K // 2, 16])
    block, head, b, key_start, length, history, q_start, q_len = sequence(
        num_blocks, order_ptr, offsets_ptr, q_offsets_ptr, num_candidates_ptr, H, False,
    )  # fmt: skip
    key_first = block * BLOCK_N
    if key_first < length:
        num_part, num_full, full0, n0, full1, part0, m0, part1, m1, part2, m2, part3 = (
            visiting_queries(
                key_first, gl.minimum(key_first + BLOCK_N, length), length, history, length - q_len,
                BLOCK_M, NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS,
            )
        )  # fmt: skip
        total = num_full + num_part
        no_score = gl.zeros([ROWS, BLOCK_M], gl.float32, score_layout)
        no_dq = gl.zeros([BLOCK_M, K // 2], gl.float32, dq_layout)
        # One row where a sum is not wanted: it costs no registers.
        dk = gl.zeros([ROWS if KEY_GRAD else 1, K], gl.float32, key_layout)
        dv = gl.zeros([ROWS if VALUE_GRAD else 1, V], gl.float32, value_layout)
        k_w = k_s.slice(HALF * ROWS, ROWS, dim=0)
        v_w = k_w
        if KEY_GRAD:
            v_w = v_s.slice(HALF * ROWS, ROWS, dim=0)
        k_columns = k_s.slice(HALF * (K // 2), K // 2, dim=1)
        column = head * K + HALF * (K // 2)
        times_grad_ptr = time_grad_ptr
        if time_grad_ptr is not None:
            times_grad_ptr += (gl.program_id(0) % REPLICAS) * (NUM_BUCKETS + 1)
        key_first += HALF * ROWS
        key_time = key_first + gl.arange(0, ROWS, gl.SliceLayout(1, score_layout))
        time_first = 0
        time_last = 0
        closest = 0
        if time_ptr is not None:
            key_time = load_times(
                key_time_ptr, key_start, key_first, length, ROWS,
                gl.SliceLayout(1, score_layout),
            )  # fmt: skip
            time_first, time_last = load_span(key_span_ptr, key_start, b, key_first)
            closest = load_closest(closest_ptr, b, CONTEXT)
        mbarrier.wait(kv_full, 0)
        if total > 0:
            # Wholly visible blocks, oldest first, then the others. The first is masked in any case:
            # it is either.
            query_first = part_block(0, part0, m0, part1, m1, part2, m2, part3) * BLOCK_M
            if num_full > 0:
                query_first = full_block(0, full0, n0, full1) * BLOCK_M
            dk, dv = _step(
                HALF, 0, k_w, v_w, k_columns, q_s, dout_s, ds_s, dq_s, dq_desc,
                q_full, dout_full, q_empty, dout_empty, ds_full, ds_empty,
                dk, dv, no_score, no_dq,
                query_first, 0, q_start, q_len, length, history,
                key_first, key_time, time_first, time_last, closest, b, column,
                position_ptr, time_ptr, threshold_ptr, query_time_ptr, query_span_ptr,
                position_grad_ptr, times_grad_ptr, half_alpha, NUM_BUCKETS,
                num_candidates_ptr is not None, True, True, QUERY_GRAD, KEY_GRAD, VALUE_GRAD,
                NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS,
            )  # fmt: skip
            last_first = query_first
            for it in range(1, num_full):
                query_first = full_block(it, full0, n0, full1) * BLOCK_M
                dk, dv = _step(
                    HALF, it, k_w, v_w, k_columns, q_s, dout_s, ds_s, dq_s, dq_desc,
                    q_full, dout_full, q_empty, dout_empty, ds_full, ds_empty,
                    dk, dv, no_score, no_dq,
                    query_first, last_first, q_start, q_len, length, history,
                    key_first, key_time, time_first, time_last, closest, b, column,
                    position_ptr, time_ptr, threshold_ptr, query_time_ptr, query_span_ptr,
                    position_grad_ptr, times_grad_ptr, half_alpha, NUM_BUCKETS,
                    num_candidates_ptr is not None, False, False, QUERY_GRAD, KEY_GRAD, VALUE_GRAD,
                    NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS,
                )  # fmt: skip
                last_first = query_first
            for it in range(gl.maximum(num_full, 1), total):
                i = it - num_full
                query_first = part_block(i, part0, m0, part1, m1, part2, m2, part3) * BLOCK_M
                dk, dv = _step(
                    HALF, it, k_w, v_w, k_columns, q_s, dout_s, ds_s, dq_s, dq_desc,
                    q_full, dout_full, q_empty, dout_empty, ds_full, ds_empty,
                    dk, dv, no_score, no_dq,
                    query_first, last_first, q_start, q_len, length, history,
                    key_first, key_time, time_first, time_last, closest, b, column,
                    position_ptr, time_ptr, threshold_ptr, query_time_ptr, query_span_ptr,
                    position_grad_ptr, times_grad_ptr, half_alpha, NUM_BUCKETS,
                    num_candidates_ptr is not None, False, True, QUERY_GRAD, KEY_GRAD, VALUE_GRAD,
                    NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS,
                )  # fmt: skip
                last_first = query_first
            if QUERY_GRAD:
                old = (total + 1) & 1
                mbarrier.wait(ds_full.index(old), ((total - 1) >> 1) & 1)
                dq_sum = warpgroup_mma(
                    ds_s.index(old).permute((1, 0)), k_columns, no_dq, use_acc=False, is_async=True
                )
                dq = warpgroup_mma_wait(0, deps=[dq_sum])
                tma.store_wait(0)
                gl.thread_barrier()
                _add_query_grad(
                    dq, dq_desc, dq_s.index(HALF * 2), last_first, q_start, q_len, column, True
                )
        # Both groups have released every stage of the ring: it stages dK and dV.
        for stage in gl.static_range(STAGES):
            uses = (total + STAGES - 1 - stage) // STAGES
            mbarrier.wait(q_empty.index(stage), (uses - 1) & 1)
        at = key_start + key_first
        dk = (dk * key_scale).to(dtype)
        dv = (dv * value_scale).to(dtype)
        if key_first + ROWS <= length:
            dk_s = q_s.index(HALF).slice(0, ROWS, dim=0)
            dv_s = dout_s.index(HALF).slice(0, ROWS, dim=0)
            if KEY_GRAD:
                dk_s.store(dk)
            if VALUE_GRAD:
                dv_s.store(dv)
            fence_async_shared()
            gl.thread_barrier()
            if KEY_GRAD:
                tma.async_copy_shared_to_global(dk_desc, [at, head * K], dk_s)
            if VALUE_GRAD:
                tma.async_copy_shared_to_global(dv_desc, [at, head * V], dv_s)
        else:
            if KEY_GRAD:
                store_rows(dk_ptr, dk, key_start, key_first, length, stride_dk, head * K)
            if VALUE_GRAD:
                store_rows(dv_ptr, dv, key_start, key_first, length, stride_dv, head * V)
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["stride_dk", "stride_dv", "num_blocks"])
def backward_kernel(
    q_desc, q_tail_desc, dout_desc, dout_tail_desc, k_desc, k_tail_desc, v_desc, v_tail_desc,
    dq_desc, dk_desc, dv_desc, dk_ptr, dv_ptr, stride_dk, stride_dv,
    order_ptr, offsets_ptr, q_offsets_ptr, num_candidates_ptr,
    position_ptr, time_ptr, threshold_ptr, query_time_ptr, key_time_ptr, query_span_ptr,
    key_span_ptr, closest_ptr, position_grad_ptr, time_grad_ptr,
    num_blocks, half_alpha, key_scale, value_scale, NUM_BUCKETS: gl.constexpr, H: gl.constexpr,
    NUM_CONTEXT: gl.constexpr, CONTEXT: gl.constexpr, WINDOW: gl.constexpr,
    GLOBAL_ROWS: gl.constexpr, GLOBAL_COLUMNS: gl.constexpr,
    STAGES: gl.constexpr, DOUT_STAGES: gl.constexpr,
    QUERY_GRAD: gl.constexpr, KEY_GRAD: gl.constexpr, VALUE_GRAD: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    BLOCK_M: gl.constexpr = q_desc.block_shape[0]
    BLOCK_N: gl.constexpr = k_desc.block_shape[0]
    k_s = gl.allocate_shared_memory(dtype, k_desc.block_shape, k_desc.layout)
    v_s = k_s
    if KEY_GRAD:
        v_s = gl.allocate_shared_memory(dtype, v_desc.block_shape, v_desc.layout)
    q_s = gl.allocate_shared_memory(dtype, [STAGES] + q_desc.block_shape, q_desc.layout)
    dout_s = gl.allocate_shared_memory(
        dtype, [DOUT_STAGES] + dout_desc.block_shape, dout_desc.layout
    )
    if QUERY_GRAD:
        ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_M], dtype)
        ds_s = gl.allocate_shared_memory(dtype, [2, BLOCK_N, BLOCK_M], ds_layout)
        dq_s = gl.allocate_shared_memory(gl.float32, [4] + dq_desc.block_shape, dq_desc.layout)
    else:
        ds_s = q_s
        dq_s = q_s
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    kv_full = gl.allocate_shared_memory(gl.int64, [1], barrier)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    dout_full = gl.allocate_shared_memory(gl.int64, [DOUT_STAGES, 1], barrier)
    dout_empty = gl.allocate_shared_memory(gl.int64, [DOUT_STAGES, 1], barrier)
    ds_full = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    ds_empty = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    mbarrier.init(kv_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
    for i in gl.static_range(DOUT_STAGES):
        mbarrier.init(dout_full.index(i), count=1)
        mbarrier.init(dout_empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(ds_full.index(i), count=2)
        mbarrier.init(ds_empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (
                0, dq_desc, dk_desc, dv_desc, dk_ptr, dv_ptr, stride_dk, stride_dv,
                q_s, dout_s, k_s, v_s, ds_s, dq_s,
                kv_full, q_full, dout_full, q_empty, dout_empty, ds_full, ds_empty,
                order_ptr, offsets_ptr, q_offsets_ptr, num_candidates_ptr, num_blocks,
                position_ptr, time_ptr, threshold_ptr, query_time_ptr, key_time_ptr,
                query_span_ptr, key_span_ptr, closest_ptr, position_grad_ptr, time_grad_ptr,
                half_alpha, key_scale, value_scale, NUM_BUCKETS,
                QUERY_GRAD, KEY_GRAD, VALUE_GRAD,
                H, NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS,
            )),
            (_consume, (
                1, dq_desc, dk_desc, dv_desc, dk_ptr, dv_ptr, stride_dk, stride_dv,
                q_s, dout_s, k_s, v_s, ds_s, dq_s,
                kv_full, q_full, dout_full, q_empty, dout_empty, ds_full, ds_empty,
                order_ptr, offsets_ptr, q_offsets_ptr, num_candidates_ptr, num_blocks,
                position_ptr, time_ptr, threshold_ptr, query_time_ptr, key_time_ptr,
                query_span_ptr, key_span_ptr, closest_ptr, position_grad_ptr, time_grad_ptr,
                half_alpha, key_scale, value_scale, NUM_BUCKETS,
                QUERY_GRAD, KEY_GRAD, VALUE_GRAD,
                H, NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS,
            )),
            (_produce, (
                q_desc, q_tail_desc, dout_desc, dout_tail_desc,
                k_desc, k_tail_desc, v_desc, v_tail_desc,
                q_s, dout_s, k_s, v_s, kv_full, q_full, dout_full, q_empty, dout_empty,
                order_ptr, offsets_ptr, q_offsets_ptr, num_candidates_ptr, num_blocks,
                KEY_GRAD, H, NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS,
            )),
        ],
        [4, 1], [240, 24],
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "stride"])
def _round_kernel(
    x_ptr, y_ptr, scale, num_rows, stride, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Y (rows of any stride) = x * scale, rounded."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (row < num_rows)[:, None] & (col < COLUMNS)[None, :]
    x = tl.load(x_ptr + row[:, None] * COLUMNS + col[None, :], mask=inside)
    y = (x * scale).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row[:, None] * stride + col[None, :], y, mask=inside)


def hstu_attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    structure: Structure,
    gradients: tuple[Tensor, Tensor, Tensor],
    deterministic: bool,
    needs_bias_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Write the gradients of q, k and v, return those of the bias tables. SiLU only.

    Args:
        dout: (R, H, V) contiguous.
        q: as `tiles` takes it, like k and v.
        k: likewise.
        v: likewise.
        structure: as in the forward pass.
        gradients: where dq, dk and dv go; shapes of q, k and v, strides as `tiles` takes them.
        deterministic: the same bits for the same input.
        needs_bias_grad: else both tables' gradients come back empty.
    """
    dq, dk, dv = gradients
    order, (k_tail, v_tail, q_tail, dout_tail) = prepare(
        structure.offsets,
        Tails(k, v, structure.offsets, BLOCK_N),
        Tails(q, dout, structure.q_offsets, BLOCK_M),
    )
    K, H = q.shape[2], q.shape[1]
    dq_sum = q
    wide = max(K, v.shape[2]) > 128
    fused = not (deterministic or wide or K == 32)  # halves of 16 columns are no operands
    if fused:
        dq_sum = torch.zeros(q.shape, device=q.device, dtype=torch.float32)
    key_scale = 0.5 * structure.alpha * structure.scale
    bias = bias_inputs(structure)
    sums = BiasGradients()
    if needs_bias_grad and not deterministic:
        sums = bias_gradients(structure)
    num_blocks = triton.cdiv(structure.max_len, BLOCK_N)
    programs = num_blocks * structure.num_sequences * H
    if programs:
        arguments = [
            tiles(q, BLOCK_M), tiles(q_tail, BLOCK_M), tiles(dout, BLOCK_M),
            tiles(dout_tail, BLOCK_M), tiles(k, BLOCK_N), tiles(k_tail, BLOCK_N),
            tiles(v, BLOCK_N), tiles(v_tail, BLOCK_N), tiles(dq_sum, BLOCK_M, K // 2),
            tiles(dk, BLOCK_N // 2), tiles(dv, BLOCK_N // 2),
            dk, dv, dk.stride(0), dv.stride(0),
            order, structure.offsets, structure.q_offsets, structure.num_candidates,
            *bias, *sums, num_blocks,
            structure.alpha * 0.5, key_scale, structure.scale,
        ]  # fmt: skip
        wanted = [(False, True), (True, False)] if wide else [(True, True)]
        for key_grad, value_grad in wanted:
            constants = {
                **kernel_constants(q, structure),
                "STAGES": 2,
                "DOUT_STAGES": 2 if value_grad else 1,
                "QUERY_GRAD": fused,
                "KEY_GRAD": key_grad,
                "VALUE_GRAD": value_grad,
            }
            launch(backward_kernel, (programs, 1, 1), arguments, constants)
    if not fused:
        query_gradient(dout, q, k, v, k_tail, order, structure, bias, dq)
    elif q.shape[0]:
        columns = H * K
        block_c = min(1024, triton.next_power_of_2(columns))
        rows = 2048 // block_c
        grid = (triton.cdiv(q.shape[0], rows), triton.cdiv(columns, block_c), 1)
        launch(
            _round_kernel,
            grid,
            (dq_sum, dq, key_scale, q.shape[0], dq.stride(0)),
            {"COLUMNS": columns, "ROWS": rows, "BLOCK_C": block_c},
        )
    if not needs_bias_grad:
        return q.new_empty(0), q.new_empty(0)
    if deterministic:
        return bias_gradient(dout, q.new_empty(0), q.new_empty(0), q, k, v, structure)
    return table_gradients(sums, structure)
