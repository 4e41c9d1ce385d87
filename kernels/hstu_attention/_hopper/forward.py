"""Forward kernel: 128 queries of one head a program, 64 in each of two consumer warp groups.

A producer warp copies q, then blocks of k and v into a ring in shared memory. A consumer multiplies
its queries with a block of keys, makes weights of the scores in registers, and multiplies these
with the values. Wholly visible blocks are pipelined: the products of the next scores and of the
present values run while weights are made, and the two consumers take turns in issuing them.

Letters: B sequences, L keys, R queries, H heads, K dim of q and k, V dim of v.
"""

import torch
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from kernels._triton.launch import launch
from kernels._triton.sizes import cdiv
from kernels.hstu_attention._hopper.bias import (
    add_time_bias,
    bias_inputs,
    load_closest,
    load_span,
    load_times,
    position_bias,
    tile_buckets,
)
from kernels.hstu_attention._hopper.launch import (
    forward_blocks,
    kernel_constants,
    tiles,
)
from kernels.hstu_attention._hopper.prepare import Programs, Tails, prepare
from kernels.hstu_attention._hopper.tile import (
    full_block,
    half_score,
    part_block,
    sequence,
    tanh,
    visited_keys,
)
from kernels.hstu_attention._triton.mask import visible_to_rows
from kernels.hstu_attention.structure import Structure

BLOCK_M = 128


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, v_tail_desc, q_s, k_s, v_s, q_full, k_full, k_empty, v_full, v_empty,
    order_ptr, offsets_ptr, q_offsets_ptr, num_candidates_ptr, num_blocks,
    H: gl.constexpr, NUM_CONTEXT: gl.constexpr, CONTEXT: gl.constexpr, WINDOW: gl.constexpr,
    GLOBAL_ROWS: gl.constexpr, GLOBAL_COLUMNS: gl.constexpr,
):  # fmt: skip
    BLOCK_M: gl.constexpr = 2 * q_s.shape[1]
    K: gl.constexpr = q_s.shape[2]
    STAGES: gl.constexpr = k_s.shape[0]
    BLOCK_N: gl.constexpr = k_s.shape[1]
    V: gl.constexpr = v_s.shape[2]
    query_first, head, b, key_start, length, history, q_start, q_len = sequence(
        num_blocks, order_ptr, offsets_ptr, q_offsets_ptr, num_candidates_ptr,
        H, BLOCK_M, True, not (WINDOW >= 0 and GLOBAL_ROWS > 0), WINDOW >= 0 and GLOBAL_ROWS > 0,
    )  # fmt: skip
    if query_first < q_len:
        mbarrier.expect(q_full, q_desc.block_type.nbytes * 2)
        for w in gl.static_range(2):
            at = [q_start + query_first + w * (BLOCK_M // 2), head * K]
            tma.async_copy_global_to_shared(q_desc, at, q_full, q_s.index(w))
        row_begin = length - q_len + query_first
        num_part, num_full, full0, n0, full1, part0, m0, part1, m1, part2, m2, part3 = visited_keys(
            row_begin, gl.minimum(row_begin + BLOCK_M, length), history, BLOCK_N,
            NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS,
        )  # fmt: skip
        for i in range(num_part + num_full):
            j = full_block(i - num_part, full0, n0, full1)
            if i < num_part:
                j = part_block(i, part0, m0, part1, m1, part2, m2, part3)
            stage = i % STAGES
            phase = ((i // STAGES) & 1) ^ 1
            mbarrier.wait(k_empty.index(stage), phase)
            mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                k_desc, [key_start + j * BLOCK_N, head * K], k_full.index(stage), k_s.index(stage)
            )
            mbarrier.wait(v_empty.index(stage), phase)
            mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
            if (j + 1) * BLOCK_N > length:
                tma.async_copy_global_to_shared(
                    v_tail_desc, [b * BLOCK_N, head * V], v_full.index(stage), v_s.index(stage)
                )
            else:
                tma.async_copy_global_to_shared(
                    v_desc, [key_start + j * BLOCK_N, head * V],
                    v_full.index(stage), v_s.index(stage),
                )  # fmt: skip


@gluon.jit
def _bias(
    no_score, row_first, row, key_first, col, b, key_start, length, history,
    query_time, time_first, time_last, closest,
    position_ptr, time_ptr, threshold_ptr, key_time_ptr, key_span_ptr,
    NUM_BUCKETS: gl.constexpr, CANDIDATES: gl.constexpr,
):  # fmt: skip
    """Return half the bias of a tile."""
    low = 0
    high = 0
    key_times = 0
    if time_ptr is not None:
        low, high = tile_buckets(
            time_first, time_last, closest, key_span_ptr, key_start, b, key_first, NUM_BUCKETS
        )
        key_times = key_time_ptr + key_start
    bias = position_bias(position_ptr, row_first, row, key_first, col, history, -1, CANDIDATES)
    return add_time_bias(bias, query_time, key_times, col, low, high, time_ptr, threshold_ptr)


@gluon.jit
def _consume(
    HALF: gl.constexpr, out_desc, out_ptr, q_s, k_s, v_s, out_s,
    q_full, k_full, k_empty, v_full, v_empty, turn,
    order_ptr, offsets_ptr, q_offsets_ptr, num_candidates_ptr, num_blocks,
    position_ptr, time_ptr, threshold_ptr, query_time_ptr, key_time_ptr, query_span_ptr,
    key_span_ptr, closest_ptr, half_alpha, scale, NUM_BUCKETS: gl.constexpr, H: gl.constexpr,
    NUM_CONTEXT: gl.constexpr, CONTEXT: gl.constexpr, WINDOW: gl.constexpr,
    GLOBAL_ROWS: gl.constexpr, GLOBAL_COLUMNS: gl.constexpr,
):  # fmt: skip
    """Compute one half of the queries."""
    ROWS: gl.constexpr = q_s.shape[1]
    BLOCK_M: gl.constexpr = 2 * ROWS
    STAGES: gl.constexpr = k_s.shape[0]
    BLOCK_N: gl.constexpr = k_s.shape[1]
    V: gl.constexpr = v_s.shape[2]
    dtype: gl.constexpr = k_s.dtype
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, score_layout)
    col_layout: gl.constexpr = gl.SliceLayout(0, score_layout)
    OTHER: gl.constexpr = 1 - HALF
    HAS_BIAS: gl.constexpr = position_ptr is not None
    CANDIDATES: gl.constexpr = num_candidates_ptr is not None
    query_first, head, b, key_start, length, history, q_start, q_len = sequence(
        num_blocks, order_ptr, offsets_ptr, q_offsets_ptr, num_candidates_ptr,
        H, BLOCK_M, True, not (WINDOW >= 0 and GLOBAL_ROWS > 0), WINDOW >= 0 and GLOBAL_ROWS > 0,
    )  # fmt: skip
    if query_first < q_len:
        row_begin = length - q_len + query_first
        num_part, num_full, full0, n0, full1, part0, m0, part1, m1, part2, m2, part3 = visited_keys(
            row_begin, gl.minimum(row_begin + BLOCK_M, length), history, BLOCK_N,
            NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS,
        )  # fmt: skip
        first = query_first + HALF * ROWS
        row = row_begin + HALF * ROWS + gl.arange(0, ROWS, row_layout)
        step = gl.arange(0, BLOCK_N, col_layout)
        query_time = row
        time_first = 0
        time_last = 0
        closest = 0
        if time_ptr is not None:
            query_time = load_times(query_time_ptr, q_start, first, q_len, ROWS, row_layout)
            time_first, time_last = load_span(query_span_ptr, q_start, b, first)
            closest = load_closest(closest_ptr, b, CONTEXT)
        no_score = gl.zeros([ROWS, BLOCK_N], gl.float32, score_layout)
        acc = warpgroup_mma_init(gl.zeros([ROWS, V], gl.float32, out_layout))
        q = q_s.index(HALF)
        mbarrier.wait(q_full, 0)

        for i in range(num_part):
            key_first = part_block(i, part0, m0, part1, m1, part2, m2, part3) * BLOCK_N
            col = key_first + step
            stage = i % STAGES
            phase = (i // STAGES) & 1
            bias = _bias(
                no_score, row_begin + HALF * ROWS, row, key_first, key_first + step, b, key_start,
                length, history, query_time, time_first, time_last, closest,
                position_ptr, time_ptr, threshold_ptr, key_time_ptr, key_span_ptr,
                NUM_BUCKETS, CANDIDATES,
            )  # fmt: skip
            mbarrier.wait(k_full.index(stage), phase)
            product = warpgroup_mma(
                q, k_s.index(stage).permute((1, 0)), no_score, use_acc=False, is_async=True
            )
            seen = visible_to_rows(
                row[:, None], col[None, :], length, history,
                NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS, CANDIDATES,
            )  # fmt: skip
            product = warpgroup_mma_wait(0, deps=[product])
            mbarrier.arrive(k_empty.index(stage))
            half = half_score(product, half_alpha, bias, HAS_BIAS)
            weight = gl.where(seen, gl.fma(half, tanh(half), half), 0.0).to(dtype)
            weight = gl.convert_layout(weight, weight_layout)
            mbarrier.wait(v_full.index(stage), phase)
            acc = warpgroup_mma(weight, v_s.index(stage), acc, is_async=True)
            acc = warpgroup_mma_init(warpgroup_mma_wait(0, deps=[acc]))
            mbarrier.arrive(v_empty.index(stage))

        if num_full > 0:
            i = num_part
            stage = i % STAGES
            key_first = full_block(0, full0, n0, full1) * BLOCK_N
            bias = _bias(
                no_score, row_begin + HALF * ROWS, row, key_first, key_first + step, b, key_start,
                length, history, query_time, time_first, time_last, closest,
                position_ptr, time_ptr, threshold_ptr, key_time_ptr, key_span_ptr,
                NUM_BUCKETS, CANDIDATES,
            )  # fmt: skip
            mbarrier.wait(k_full.index(stage), (i // STAGES) & 1)
            product = warpgroup_mma(
                q, k_s.index(stage).permute((1, 0)), no_score, use_acc=False, is_async=True
            )
            product = warpgroup_mma_wait(0, deps=[product])
            mbarrier.arrive(k_empty.index(stage))
            half = half_score(product, half_alpha, bias, HAS_BIAS)
            weight = gl.convert_layout(gl.fma(half, tanh(half), half).to(dtype), weight_layout)
            for f in range(1, num_full):
                i = num_part + f
                stage = i % STAGES
                last = (i - 1) % STAGES
                key_first = full_block(f, full0, n0, full1) * BLOCK_N
                mbarrier.wait(k_full.index(stage), (i // STAGES) & 1)
                mbarrier.wait(turn.index(HALF), ((f - 1) & 1) ^ OTHER)
                product = warpgroup_mma(
                    q, k_s.index(stage).permute((1, 0)), no_score, use_acc=False, is_async=True
                )
                mbarrier.wait(v_full.index(last), ((i - 1) // STAGES) & 1)
                acc = warpgroup_mma(weight, v_s.index(last), acc, is_async=True)
                mbarrier.arrive(turn.index(OTHER))
                bias = _bias(
                    no_score, row_begin + HALF * ROWS, row, key_first, key_first + step, b,
                    key_start, length, history, query_time, time_first, time_last, closest,
                    position_ptr, time_ptr, threshold_ptr, key_time_ptr, key_span_ptr,
                    NUM_BUCKETS, CANDIDATES,
                )  # fmt: skip
                product = warpgroup_mma_wait(1, deps=[product])
                mbarrier.arrive(k_empty.index(stage))
                half = half_score(product, half_alpha, bias, HAS_BIAS)
                made = gl.convert_layout(gl.fma(half, tanh(half), half).to(dtype), weight_layout)
                # Finished before the loop turns: ptxas runs products one by one otherwise (C7514).
                done, weight = warpgroup_mma_wait(0, deps=[acc, made])
                acc = warpgroup_mma_init(done)
                mbarrier.arrive(v_empty.index(last))
            last = (num_part + num_full - 1) % STAGES
            mbarrier.wait(v_full.index(last), ((num_part + num_full - 1) // STAGES) & 1)
            acc = warpgroup_mma(weight, v_s.index(last), acc, is_async=True)
            acc = warpgroup_mma_init(warpgroup_mma_wait(0, deps=[acc]))

        out = (warpgroup_mma_wait(0, deps=[acc]) * scale).to(dtype)
        if first + ROWS <= q_len:
            staging = out_s.index(HALF)  # may be q's, which this group alone reads, and has read
            staging.store(out)
            fence_async_shared()
            gl.thread_barrier()
            tma.async_copy_shared_to_global(out_desc, [q_start + first, head * V], staging)
            tma.store_wait(0)
        else:
            rows = first + gl.arange(0, ROWS, gl.SliceLayout(1, out_layout))
            cols = head * V + gl.arange(0, V, gl.SliceLayout(0, out_layout))
            at = (q_start + rows).to(gl.int64)[:, None] * (H * V) + cols[None, :]
            gl.store(out_ptr + at, out, mask=(rows < q_len)[:, None])


@gluon.jit(do_not_specialize=["num_blocks"])
def forward_kernel(
    q_desc, k_desc, v_desc, v_tail_desc, out_desc, out_ptr,
    order_ptr, offsets_ptr, q_offsets_ptr, num_candidates_ptr,
    position_ptr, time_ptr, threshold_ptr, query_time_ptr, key_time_ptr, query_span_ptr,
    key_span_ptr, closest_ptr, num_blocks, half_alpha, scale,
    NUM_BUCKETS: gl.constexpr, H: gl.constexpr,
    NUM_CONTEXT: gl.constexpr, CONTEXT: gl.constexpr, WINDOW: gl.constexpr,
    GLOBAL_ROWS: gl.constexpr, GLOBAL_COLUMNS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    q_s = gl.allocate_shared_memory(dtype, [2] + q_desc.block_shape, q_desc.layout)
    k_s = gl.allocate_shared_memory(dtype, [STAGES] + k_desc.block_shape, k_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, [STAGES] + v_desc.block_shape, v_desc.layout)
    if q_desc.block_shape[1] == out_desc.block_shape[1]:
        out_s = q_s
    else:
        out_s = gl.allocate_shared_memory(dtype, [2] + out_desc.block_shape, out_desc.layout)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [1], barrier)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    mbarrier.init(q_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(turn.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (
                0, out_desc, out_ptr, q_s, k_s, v_s, out_s,
                q_full, k_full, k_empty, v_full, v_empty, turn,
                order_ptr, offsets_ptr, q_offsets_ptr, num_candidates_ptr, num_blocks,
                position_ptr, time_ptr, threshold_ptr, query_time_ptr, key_time_ptr,
                query_span_ptr, key_span_ptr, closest_ptr, half_alpha, scale, NUM_BUCKETS,
                H, NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS,
            )),
            (_consume, (
                1, out_desc, out_ptr, q_s, k_s, v_s, out_s,
                q_full, k_full, k_empty, v_full, v_empty, turn,
                order_ptr, offsets_ptr, q_offsets_ptr, num_candidates_ptr, num_blocks,
                position_ptr, time_ptr, threshold_ptr, query_time_ptr, key_time_ptr,
                query_span_ptr, key_span_ptr, closest_ptr, half_alpha, scale, NUM_BUCKETS,
                H, NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS,
            )),
            (_produce, (
                q_desc, k_desc, v_desc, v_tail_desc, q_s, k_s, v_s,
                q_full, k_full, k_empty, v_full, v_empty,
                order_ptr, offsets_ptr, q_offsets_ptr, num_candidates_ptr, num_blocks,
                H, NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS,
            )),
        ],
        [4, 1], [240, 24],
    )  # fmt: skip


def hstu_attention_fwd(q: Tensor, k: Tensor, v: Tensor, structure: Structure) -> Tensor:
    """Return (R, H, V). q, k and v as `tiles` takes them; SiLU only."""
    blocks = forward_blocks(q.shape[2], v.shape[2], time=structure.time_table is not None)
    block_n = blocks["BLOCK_N"]
    out = torch.empty(*q.shape[:2], v.shape[2], device=q.device, dtype=q.dtype)
    H, num_blocks = q.shape[1], cdiv(structure.max_q_len, BLOCK_M)
    programs, count = None, num_blocks * structure.num_sequences * H
    if not (structure.local_window is not None and structure.global_rows):  # else by block
        longest = structure.max_q_len
        programs = Programs(structure.q_offsets, q.shape[0], longest, BLOCK_M, H)
        count = programs.count
    tail = Tails(v, None, structure.offsets, block_n)
    order, placed, (v_tail, _) = prepare(structure.offsets, tail, programs=programs)
    if count:
        arguments = [
            tiles(q, BLOCK_M // 2), tiles(k, block_n), tiles(v, block_n),
            tiles(v_tail, block_n), tiles(out, BLOCK_M // 2), out,
            order if programs is None else placed,
            structure.offsets, structure.q_offsets, structure.num_candidates,
            *bias_inputs(structure), num_blocks, structure.alpha * 0.5, structure.scale,
        ]  # fmt: skip
        constants = {**kernel_constants(q, structure), "STAGES": blocks["STAGES"]}
        launch(forward_kernel, (count, 1, 1), arguments, constants)
    return out
