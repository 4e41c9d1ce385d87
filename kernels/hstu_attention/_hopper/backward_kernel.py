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

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.hstu_attention._hopper.backward_step import add_query_grad, backward_step
from kernels.hstu_attention._hopper.bias import load_closest, load_span, load_times
from kernels.hstu_attention._hopper.bias_gradient import REPLICAS
from kernels.hstu_attention._hopper.tile import (
    full_block,
    part_block,
    sequence,
    store_rows,
    visiting_queries,
)


@gluon.jit
def _produce(
    q_desc, q_tail_desc, dout_desc, dout_tail_desc, k_desc, k_tail_desc, v_desc, v_tail_desc,
    q_s, dout_s, k_s, v_s, kv_full, q_full, dout_full, q_empty, dout_empty,
    order_ptr, offsets_ptr, q_offsets_ptr, num_candidates_ptr,
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
    key_first, head, b, key_start, length, history, q_start, q_len = sequence(
        0, order_ptr, offsets_ptr, q_offsets_ptr, num_candidates_ptr,
        H, BLOCK_N, False, True, False,
    )  # fmt: skip
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
def _consume(
    HALF: gl.constexpr, dq_desc, dk_desc, dv_desc, dk_ptr, dv_ptr, stride_dk, stride_dv,
    q_s, dout_s, k_s, v_s, ds_s, dq_s,
    kv_full, q_full, dout_full, q_empty, dout_empty, ds_full, ds_empty,
    order_ptr, offsets_ptr, q_offsets_ptr, num_candidates_ptr,
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
    key_first, head, b, key_start, length, history, q_start, q_len = sequence(
        0, order_ptr, offsets_ptr, q_offsets_ptr, num_candidates_ptr,
        H, BLOCK_N, False, True, False,
    )  # fmt: skip
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
            dk, dv = backward_step(
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
                dk, dv = backward_step(
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
                dk, dv = backward_step(
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
                add_query_grad(
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


@gluon.jit(do_not_specialize=["stride_dk", "stride_dv"])
def backward_kernel(
    q_desc, q_tail_desc, dout_desc, dout_tail_desc, k_desc, k_tail_desc, v_desc, v_tail_desc,
    dq_desc, dk_desc, dv_desc, dk_ptr, dv_ptr, stride_dk, stride_dv,
    order_ptr, offsets_ptr, q_offsets_ptr, num_candidates_ptr,
    position_ptr, time_ptr, threshold_ptr, query_time_ptr, key_time_ptr, query_span_ptr,
    key_span_ptr, closest_ptr, position_grad_ptr, time_grad_ptr,
    half_alpha, key_scale, value_scale, NUM_BUCKETS: gl.constexpr, H: gl.constexpr,
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
                order_ptr, offsets_ptr, q_offsets_ptr, num_candidates_ptr,
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
                order_ptr, offsets_ptr, q_offsets_ptr, num_candidates_ptr,
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
                order_ptr, offsets_ptr, q_offsets_ptr, num_candidates_ptr,
                KEY_GRAD, H, NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS,
            )),
        ],
        [4, 1], [240, 24],
    )  # fmt: skip
