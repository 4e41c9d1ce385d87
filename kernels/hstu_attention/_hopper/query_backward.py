"""dQ in a pass of its own, without sums in global memory: the same input gives the same bits.

128 queries of one head a program, 64 in each of two consumer warp groups, over blocks of keys.

    S = Q K^T,  dP = dO V^T,  dS = dP * silu'(S),  dQ = alpha * scale * dS K
"""

import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels._triton.launch import launch
from kernels._triton.sizes import cdiv
from kernels.hstu_attention._hopper.bias import (
    BiasInputs,
    add_time_bias,
    load_closest,
    load_span,
    load_times,
    position_bias,
    tile_buckets,
)
from kernels.hstu_attention._hopper.launch import kernel_constants, tiles
from kernels.hstu_attention._hopper.tile import (
    full_block,
    half_score,
    part_block,
    sequence,
    store_rows,
    tanh,
    visited_keys,
)
from kernels.hstu_attention._triton.mask import visible_to_rows
from kernels.hstu_attention.structure import Structure

BLOCK_M = 128
TAIL = gl.constexpr(128)
"""Rows of a sequence's block in k_tail: a multiple of the keys of a block here."""


@gluon.jit
def _produce(
    q_desc, dout_desc, k_desc, k_tail_desc, v_desc,
    q_s, dout_s, k_s, v_s, q_full, k_full, k_empty, v_full, v_empty,
    order_ptr, offsets_ptr, q_offsets_ptr, num_candidates_ptr, num_blocks,
    H: gl.constexpr, NUM_CONTEXT: gl.constexpr, CONTEXT: gl.constexpr, WINDOW: gl.constexpr,
    GLOBAL_ROWS: gl.constexpr, GLOBAL_COLUMNS: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = q_s.shape[1]
    BLOCK_M: gl.constexpr = 2 * ROWS
    K: gl.constexpr = q_s.shape[2]
    V: gl.constexpr = v_s.shape[2]
    STAGES: gl.constexpr = k_s.shape[0]
    V_STAGES: gl.constexpr = v_s.shape[0]
    BLOCK_N: gl.constexpr = k_s.shape[1]
    query_first, head, b, key_start, length, history, q_start, q_len = sequence(
        num_blocks, order_ptr, offsets_ptr, q_offsets_ptr, num_candidates_ptr,
        H, BLOCK_M, True, False, WINDOW >= 0 and GLOBAL_ROWS > 0,
    )  # fmt: skip
    if query_first < q_len:
        mbarrier.expect(q_full, 2 * (q_desc.block_type.nbytes + dout_desc.block_type.nbytes))
        for w in gl.static_range(2):
            at = q_start + query_first + w * ROWS
            tma.async_copy_global_to_shared(q_desc, [at, head * K], q_full, q_s.index(w))
            tma.async_copy_global_to_shared(dout_desc, [at, head * V], q_full, dout_s.index(w))
        row_begin = length - q_len + query_first
        num_part, num_full, full0, n0, full1, part0, m0, part1, m1, part2, m2, part3 = visited_keys(
            row_begin, gl.minimum(row_begin + BLOCK_M, length), history, BLOCK_N,
            NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS,
        )  # fmt: skip
        for i in range(num_full + num_part):
            j = part_block(i - num_full, part0, m0, part1, m1, part2, m2, part3)
            if i < num_full:
                j = full_block(i, full0, n0, full1)
            stage = i % STAGES
            mbarrier.wait(k_empty.index(stage), ((i // STAGES) & 1) ^ 1)
            mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
            if (j + 1) * BLOCK_N > length:
                at = b * TAIL + j * BLOCK_N % TAIL
                tma.async_copy_global_to_shared(
                    k_tail_desc, [at, head * K], k_full.index(stage), k_s.index(stage)
                )
            else:
                tma.async_copy_global_to_shared(
                    k_desc, [key_start + j * BLOCK_N, head * K],
                    k_full.index(stage), k_s.index(stage),
                )  # fmt: skip
            v_stage = i % V_STAGES
            mbarrier.wait(v_empty.index(v_stage), ((i // V_STAGES) & 1) ^ 1)
            mbarrier.expect(v_full.index(v_stage), v_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                v_desc, [key_start + j * BLOCK_N, head * V],
                v_full.index(v_stage), v_s.index(v_stage),
            )  # fmt: skip


@gluon.jit
def _step(
    it, key_first, q, dout, k_s, v_s, k_full, k_empty, v_full, v_empty, dq, no_score,
    row_first, row, query_time, time_first, time_last, closest, b, key_start, length, history,
    position_ptr, time_ptr, threshold_ptr, key_time_ptr, key_span_ptr, half_alpha,
    NUM_BUCKETS: gl.constexpr, CANDIDATES: gl.constexpr, MASKED: gl.constexpr,
    NUM_CONTEXT: gl.constexpr, CONTEXT: gl.constexpr, WINDOW: gl.constexpr,
    GLOBAL_ROWS: gl.constexpr, GLOBAL_COLUMNS: gl.constexpr,
):  # fmt: skip
    """Add what one block of keys gives to dQ."""
    dtype: gl.constexpr = k_s.dtype
    STAGES: gl.constexpr = k_s.shape[0]
    BLOCK_N: gl.constexpr = k_s.shape[1]
    col_layout: gl.constexpr = gl.SliceLayout(0, no_score.type.layout)
    V_STAGES: gl.constexpr = v_s.shape[0]
    stage = it % STAGES
    v_stage = it % V_STAGES
    col = key_first + gl.arange(0, BLOCK_N, col_layout)
    mbarrier.wait(k_full.index(stage), (it // STAGES) & 1)
    product = warpgroup_mma(
        q, k_s.index(stage).permute((1, 0)), no_score, use_acc=False, is_async=True
    )
    mbarrier.wait(v_full.index(v_stage), (it // V_STAGES) & 1)
    dweight = warpgroup_mma(
        dout, v_s.index(v_stage).permute((1, 0)), no_score, use_acc=False, is_async=True
    )
    low = 0
    high = 0
    key_times = 0
    if time_ptr is not None:
        low, high = tile_buckets(
            time_first, time_last, closest, key_span_ptr, key_start, b, key_first, NUM_BUCKETS
        )
        key_times = key_time_ptr + key_start
    bias = position_bias(position_ptr, row_first, row, key_first, col, history, -1, CANDIDATES)
    bias = add_time_bias(bias, query_time, key_times, col, low, high, time_ptr, threshold_ptr)
    product = warpgroup_mma_wait(1, deps=[product])
    half = half_score(product, half_alpha, bias, position_ptr is not None)
    t = tanh(half)
    weight = gl.fma(half, t, half)
    slope = gl.fma(t, 1.0 - weight, 1.0 + weight)  # twice the derivative of silu
    dweight = warpgroup_mma_wait(0, deps=[dweight])
    mbarrier.arrive(v_empty.index(v_stage))
    dscore = dweight * slope
    if MASKED:
        seen = visible_to_rows(
            row[:, None], col[None, :], length, history,
            NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS, CANDIDATES,
        )  # fmt: skip
        dscore = gl.where(seen, dscore, 0.0)
    operand: gl.constexpr = gl.DotOperandLayout(0, dq.type.layout, 2)
    dq_sum = warpgroup_mma(
        gl.convert_layout(dscore.to(dtype), operand), k_s.index(stage), dq, is_async=True
    )
    dq = warpgroup_mma_wait(0, deps=[dq_sum])
    mbarrier.arrive(k_empty.index(stage))
    return dq


@gluon.jit
def _consume(
    HALF: gl.constexpr, dq_ptr, stride_dq,
    q_s, dout_s, k_s, v_s, q_full, k_full, k_empty, v_full, v_empty,
    order_ptr, offsets_ptr, q_offsets_ptr, num_candidates_ptr, num_blocks,
    position_ptr, time_ptr, threshold_ptr, query_time_ptr, key_time_ptr, query_span_ptr,
    key_span_ptr, closest_ptr, half_alpha, scale, NUM_BUCKETS: gl.constexpr, H: gl.constexpr,
    NUM_CONTEXT: gl.constexpr, CONTEXT: gl.constexpr, WINDOW: gl.constexpr,
    GLOBAL_ROWS: gl.constexpr, GLOBAL_COLUMNS: gl.constexpr,
):  # fmt: skip
    """Compute dQ of one half of the queries."""
    ROWS: gl.constexpr = q_s.shape[1]
    BLOCK_M: gl.constexpr = 2 * ROWS
    K: gl.constexpr = q_s.shape[2]
    BLOCK_N: gl.constexpr = k_s.shape[1]
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, score_layout)
    query_first, head, b, key_start, length, history, q_start, q_len = sequence(
        num_blocks, order_ptr, offsets_ptr, q_offsets_ptr, num_candidates_ptr,
        H, BLOCK_M, True, False, WINDOW >= 0 and GLOBAL_ROWS > 0,
    )  # fmt: skip
    if query_first < q_len:
        row_begin = length - q_len + query_first
        num_part, num_full, full0, n0, full1, part0, m0, part1, m1, part2, m2, part3 = visited_keys(
            row_begin, gl.minimum(row_begin + BLOCK_M, length), history, BLOCK_N,
            NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS,
        )  # fmt: skip
        first = query_first + HALF * ROWS
        row_first = row_begin + HALF * ROWS
        row = row_first + gl.arange(0, ROWS, row_layout)
        query_time = row
        time_first = 0
        time_last = 0
        closest = 0
        if time_ptr is not None:
            query_time = load_times(query_time_ptr, q_start, first, q_len, ROWS, row_layout)
            time_first, time_last = load_span(query_span_ptr, q_start, b, first)
            closest = load_closest(closest_ptr, b, CONTEXT)
        no_score = gl.zeros([ROWS, BLOCK_N], gl.float32, score_layout)
        dq = gl.zeros([ROWS, K], gl.float32, dq_layout)
        q = q_s.index(HALF)
        dout = dout_s.index(HALF)
        mbarrier.wait(q_full, 0)
        for it in range(num_full):
            dq = _step(
                it, full_block(it, full0, n0, full1) * BLOCK_N, q, dout, k_s, v_s,
                k_full, k_empty, v_full, v_empty, dq, no_score,
                row_first, row, query_time, time_first, time_last, closest,
                b, key_start, length, history,
                position_ptr, time_ptr, threshold_ptr, key_time_ptr, key_span_ptr, half_alpha,
                NUM_BUCKETS, num_candidates_ptr is not None, False,
                NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS,
            )  # fmt: skip
        for it in range(num_full, num_full + num_part):
            i = it - num_full
            dq = _step(
                it, part_block(i, part0, m0, part1, m1, part2, m2, part3) * BLOCK_N, q, dout,
                k_s, v_s, k_full, k_empty, v_full, v_empty, dq, no_score,
                row_first, row, query_time, time_first, time_last, closest,
                b, key_start, length, history,
                position_ptr, time_ptr, threshold_ptr, key_time_ptr, key_span_ptr, half_alpha,
                NUM_BUCKETS, num_candidates_ptr is not None, True,
                NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS,
            )  # fmt: skip
        dq = (dq * scale).to(q_s.dtype)
        store_rows(dq_ptr, dq, q_start, first, q_len, stride_dq, head * K)


@gluon.jit(do_not_specialize=["stride_dq", "num_blocks"])
def query_backward_kernel(
    q_desc, dout_desc, k_desc, k_tail_desc, v_desc, dq_ptr, stride_dq,
    order_ptr, offsets_ptr, q_offsets_ptr, num_candidates_ptr,
    position_ptr, time_ptr, threshold_ptr, query_time_ptr, key_time_ptr, query_span_ptr,
    key_span_ptr, closest_ptr, num_blocks, half_alpha, scale,
    NUM_BUCKETS: gl.constexpr, H: gl.constexpr,
    NUM_CONTEXT: gl.constexpr, CONTEXT: gl.constexpr, WINDOW: gl.constexpr,
    GLOBAL_ROWS: gl.constexpr, GLOBAL_COLUMNS: gl.constexpr, STAGES: gl.constexpr,
    V_STAGES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    q_s = gl.allocate_shared_memory(dtype, [2] + q_desc.block_shape, q_desc.layout)
    dout_s = gl.allocate_shared_memory(dtype, [2] + dout_desc.block_shape, dout_desc.layout)
    k_s = gl.allocate_shared_memory(dtype, [STAGES] + k_desc.block_shape, k_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, [V_STAGES] + v_desc.block_shape, v_desc.layout)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [1], barrier)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_full = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], barrier)
    v_empty = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], barrier)
    mbarrier.init(q_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
    for i in gl.static_range(V_STAGES):
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (
                0, dq_ptr, stride_dq,
                q_s, dout_s, k_s, v_s, q_full, k_full, k_empty, v_full, v_empty,
                order_ptr, offsets_ptr, q_offsets_ptr, num_candidates_ptr, num_blocks,
                position_ptr, time_ptr, threshold_ptr, query_time_ptr, key_time_ptr,
                query_span_ptr, key_span_ptr, closest_ptr, half_alpha, scale, NUM_BUCKETS, H,
                NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS,
            )),
            (_consume, (
                1, dq_ptr, stride_dq,
                q_s, dout_s, k_s, v_s, q_full, k_full, k_empty, v_full, v_empty,
                order_ptr, offsets_ptr, q_offsets_ptr, num_candidates_ptr, num_blocks,
                position_ptr, time_ptr, threshold_ptr, query_time_ptr, key_time_ptr,
                query_span_ptr, key_span_ptr, closest_ptr, half_alpha, scale, NUM_BUCKETS, H,
                NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS,
            )),
            (_produce, (
                q_desc, dout_desc, k_desc, k_tail_desc, v_desc,
                q_s, dout_s, k_s, v_s, q_full, k_full, k_empty, v_full, v_empty,
                order_ptr, offsets_ptr, q_offsets_ptr, num_candidates_ptr, num_blocks,
                H, NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS,
            )),
        ],
        [4, 1], [240, 24],
    )  # fmt: skip


def query_gradient(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_tail: Tensor,
    order: Tensor,
    structure: Structure,
    bias: BiasInputs,
    dq: Tensor,
) -> None:
    """Write dQ. Arguments as in backward.py; k_tail and order as `prepare` returns them."""
    num_blocks = cdiv(structure.max_q_len, BLOCK_M)
    programs = num_blocks * structure.num_sequences * q.shape[1]
    wide = max(q.shape[2], v.shape[2]) > 128
    block_n = 64 if wide or structure.position_table is not None else 128
    if programs:
        arguments = [
            tiles(q, BLOCK_M // 2), tiles(dout, BLOCK_M // 2),
            tiles(k, block_n), tiles(k_tail, block_n), tiles(v, block_n), dq, dq.stride(0),
            order, structure.offsets, structure.q_offsets, structure.num_candidates,
            *bias, num_blocks,
            structure.alpha * 0.5, 0.5 * structure.alpha * structure.scale,
        ]  # fmt: skip
        stages = {"STAGES": 2, "V_STAGES": 1 if wide else 2}
        constants = {**kernel_constants(q, structure), **stages}
        launch(query_backward_kernel, (programs, 1, 1), arguments, constants)
