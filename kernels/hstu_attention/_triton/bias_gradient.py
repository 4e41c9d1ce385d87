"""Gradients of the bias tables: d bias = dS, summed over heads and over the pairs of an entry.

The heads share the bias, so a pass of its own adds their dS in registers first and sums by entry
once. Tiles are grouped so that all tiles of a program share their distances: the history's by
diagonal, query block - key block; those of candidates, which all stand at the end of the history,
by key block counted back from there. Sums by distance and by time bucket stay in registers; each
program writes its own, and a last ordered sum makes the tables: no atomics.

Letters: B sequences, L keys, R queries, H heads, K dim of q and k, V dim of v.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.hstu_attention._triton.launch import (
    is_captured,
    kernel_blocks,
    kernel_constants,
    kernel_inputs,
)
from kernels.hstu_attention._triton.mask import pick2, visible
from kernels.hstu_attention._triton.tile import (
    load_rows,
    load_times,
    relative_bias,
    silu_and_slope,
    time_bucket,
)
from kernels.hstu_attention.structure import Structure

MAX_PROGRAMS = 8192
"""Programs beyond this take several sequences each, which bounds the memory of the partial sums."""


@triton.jit
def _score_grad(
    q_base, k_base, v_base, dout_base, lse_base, delta_base,
    query_first, q_len, key_first, length, bias, seen,
    stride_qr, stride_qh, stride_kl, stride_kh, stride_vl, stride_vh, alpha,
    SOFTMAX: tl.constexpr, FAST: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Return dS / scale of one (queries, keys) tile, summed over the heads."""
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for h in tl.range(0, H, num_stages=STAGES):
        q = load_rows(q_base + h * stride_qh, query_first, q_len, stride_qr, K, BLOCK, BLOCK_K)
        k = load_rows(k_base + h * stride_kh, key_first, length, stride_kl, K, BLOCK, BLOCK_K)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * alpha + bias
        dout = load_rows(dout_base + h * V, query_first, q_len, H * V, V, BLOCK, BLOCK_V)
        v = load_rows(v_base + h * stride_vh, key_first, length, stride_vl, V, BLOCK, BLOCK_V)
        dweight = tl.dot(dout, tl.trans(v), input_precision="ieee")
        if SOFTMAX:
            rows = query_first + tl.arange(0, BLOCK)
            inside = (rows >= 0) & (rows < q_len)
            lse = tl.load(lse_base + rows * H + h, mask=inside, other=0.0)
            delta = tl.load(delta_base + rows * H + h, mask=inside, other=0.0)
            total += tl.exp(score - lse[:, None]) * (dweight - delta[:, None])
        else:
            _, slope = silu_and_slope(score, FAST)
            total += dweight * slope
    return tl.where(seen, total, 0.0)


@triton.jit(do_not_specialize=["num_sequences", "num_chunks", "num_diagonals", "first_diagonal"])
def _bias_grad_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, position_sum_ptr, time_sum_ptr,
    offsets_ptr, q_offsets_ptr, num_candidates_ptr,
    position_ptr, time_ptr, threshold_ptr, query_time_ptr, key_time_ptr,
    stride_qr, stride_qh, stride_kl, stride_kh, stride_vl, stride_vh,
    num_sequences, num_chunks, num_diagonals, first_diagonal, alpha, scale,
    SOFTMAX: tl.constexpr, FAST: tl.constexpr, REACH: tl.constexpr, NUM_BUCKETS: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    NUM_CONTEXT: tl.constexpr, CONTEXT: tl.constexpr, WINDOW: tl.constexpr,
    GLOBAL_ROWS: tl.constexpr, GLOBAL_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_T: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0) // num_chunks
    chunk = tl.program_id(0) % num_chunks
    is_diagonal = group < num_diagonals
    diagonal = group + first_diagonal
    back = group - num_diagonals  # of candidates: key blocks counted back from the history's end
    far: tl.constexpr = (NUM_CONTEXT + GLOBAL_COLUMNS + BLOCK - 1) // BLOCK
    i = tl.arange(0, BLOCK)
    low = tl.zeros([BLOCK], tl.float32)
    high = tl.zeros([BLOCK], tl.float32)
    time_sum = tl.zeros([BLOCK_T], tl.float32)
    for b in range(chunk, num_sequences, num_chunks):
        key_start = tl.load(offsets_ptr + b)
        length = (tl.load(offsets_ptr + b + 1) - key_start).to(tl.int32)
        q_start = tl.load(q_offsets_ptr + b)
        q_len = (tl.load(q_offsets_ptr + b + 1) - q_start).to(tl.int32)
        history = length
        if num_candidates_ptr is not None:
            history = length - tl.load(num_candidates_ptr + b).to(tl.int32)
        first_row = length - q_len
        # The tiles of this group: two runs of query blocks.
        begin0 = tl.maximum(tl.maximum(diagonal, first_row // BLOCK), 0)
        end = tl.minimum(tl.cdiv(history, BLOCK), tl.cdiv(history, BLOCK) + diagonal)
        if diagonal < 0:
            end = tl.minimum(end, (NUM_CONTEXT + BLOCK - 1) // BLOCK)
        end0 = end
        begin1 = end
        if WINDOW >= 0 and diagonal * BLOCK - BLOCK + 1 > WINDOW:
            end0 = tl.minimum(end, diagonal + far)
            begin1 = tl.maximum(tl.maximum(history - GLOBAL_ROWS, 0) // BLOCK, end0)
            begin1 = tl.maximum(begin1, begin0)
        count0 = tl.maximum(end0 - begin0, 0)
        num_tiles = count0 + tl.maximum(end - begin1, 0)
        row_limit = history
        candidate_blocks = tl.cdiv(length - history, BLOCK)
        if not is_diagonal:
            row_limit = length
            num_tiles = tl.where(back * BLOCK < history, candidate_blocks, 0)
            count0 = num_tiles
            if back == 0:
                num_tiles += candidate_blocks  # each candidate with itself
        for tile in range(num_tiles):
            row_first = pick2(tile, begin0, count0, begin1) * BLOCK
            key_first = row_first - diagonal * BLOCK
            if not is_diagonal:
                row_first = history + tl.where(tile < count0, tile, tile - count0) * BLOCK
                key_first = tl.where(tile < count0, history - (back + 1) * BLOCK, row_first)
            row = row_first + i[:, None]
            col = key_first + i[None, :]
            seen = visible(
                row, col, length, history,
                NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS,
            )  # fmt: skip
            seen = seen & (row >= first_row) & (row < row_limit) & (col >= 0)
            query_first = row_first - first_row
            query_time = row
            key_time = col
            if time_ptr is not None:
                query_time = load_times(query_time_ptr, q_start, query_first, q_len, BLOCK)[:, None]
                key_time = load_times(key_time_ptr, key_start, key_first, length, BLOCK)[None, :]
            bias = relative_bias(
                row, col, history, query_time, key_time,
                position_ptr, time_ptr, threshold_ptr, REACH, NUM_BUCKETS,
            )  # fmt: skip
            dscore = _score_grad(
                q_ptr + q_start * stride_qr, k_ptr + key_start * stride_kl,
                v_ptr + key_start * stride_vl, dout_ptr + q_start * (H * V),
                lse_ptr + q_start * H, delta_ptr + q_start * H,
                query_first, q_len, key_first, length, bias, seen,
                stride_qr, stride_qh, stride_kl, stride_kh, stride_vl, stride_vh, alpha,
                SOFTMAX, FAST, H, K, V, BLOCK, BLOCK_K, BLOCK_V, STAGES,
            )  # fmt: skip
            if is_diagonal:
                # Shift row r by r: column c then holds the pairs of distance c (mod BLOCK).
                shifted = tl.gather(dscore, (i[:, None] - i[None, :]) & (BLOCK - 1), 1)
                is_low = i[None, :] <= i[:, None]
                low += tl.sum(tl.where(is_low, shifted, 0.0), 0)
                high += tl.sum(tl.where(is_low, 0.0, shifted), 0)
            elif tile < count0:
                low += tl.sum(dscore, 0)
            else:
                high += tl.where(i == 0, tl.sum(dscore), 0.0)
            if time_ptr is not None:
                bucket = time_bucket(tl.abs(query_time - key_time), threshold_ptr, NUM_BUCKETS)
                least = tl.min(tl.where(seen, bucket, NUM_BUCKETS + 1))
                most = tl.max(tl.where(seen, bucket, -1))
                for t in range(least, most + 1):
                    share = tl.sum(tl.where(bucket == t, dscore, 0.0))
                    time_sum += tl.where(tl.arange(0, BLOCK_T) == t, share, 0.0)
    slot = tl.program_id(0).to(tl.int64)
    tl.store(position_sum_ptr + slot * 2 * BLOCK + i, low * scale)
    tl.store(position_sum_ptr + slot * 2 * BLOCK + BLOCK + i, high * scale)
    if time_ptr is not None:
        at = slot * BLOCK_T + tl.arange(0, BLOCK_T)
        tl.store(time_sum_ptr + at, time_sum * scale)


def bias_gradient(
    dout: Tensor, lse: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor, structure: Structure
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the position table and of the time table (empty without one)."""
    position, time, device = structure.position_table, structure.time_table, q.device
    assert position is not None
    settings = kernel_blocks("bias_grad", q, v, structure)
    block = settings["BLOCK_N"]
    num_times = 0 if time is None else time.numel()
    block_t = triton.next_power_of_2(max(num_times, 1))

    num_blocks = triton.cdiv(structure.max_len, block)
    after = {"causal": 0, "prefix": structure.num_context, "prefix_sees_all": structure.max_len}
    num_negative = max(triton.cdiv(after[structure.context], block) - 1, 0)
    num_diagonals = num_negative + num_blocks
    num_backs = 0 if structure.num_candidates is None else num_blocks
    num_groups = num_diagonals + num_backs
    num_chunks = max(1, min(structure.num_sequences, MAX_PROGRAMS // max(num_groups, 1)))
    position_sum = torch.zeros(num_groups, num_chunks, 2, block, device=device)
    time_sum = torch.zeros(num_groups * num_chunks, block_t, device=device)
    if num_groups:
        _bias_grad_kernel[(num_groups * num_chunks,)](
            q, k, v, dout, lse, delta, position_sum, time_sum, *kernel_inputs(structure)[1:],
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
            structure.num_sequences, num_chunks, num_diagonals, -num_negative,
            structure.alpha, structure.scale,
            **kernel_constants(q, v, structure), BLOCK=block, BLOCK_T=block_t,
            STAGES=settings["STAGES"], num_warps=settings["num_warps"],
        )  # fmt: skip

    # A CUDA graph makes its own: what is kept for others may be dropped while the graph lives.
    entries = _entries.__wrapped__ if is_captured(q) else _entries
    entry = entries(block, num_negative, num_blocks, num_backs, position.numel() // 2, device)
    dposition = torch.zeros(position.numel(), device=device)
    # index_put_ sums in a fixed order, index_add_ does not.
    dposition.index_put_((entry,), position_sum.sum(1), accumulate=True)
    dtime = time_sum.sum(0)[:num_times]
    return dposition.to(position.dtype), dtime.to(position.dtype if time is None else time.dtype)


@functools.lru_cache(maxsize=32)
def _entries(
    block: int, num_negative: int, num_blocks: int, num_backs: int, reach: int, device: torch.device
) -> Tensor:
    """Return the entry of the position table of each sum, as low and high were filled.

    Kept, since the layers of a model ask for the same, and making it is a dozen kernels.
    """
    step = torch.arange(block, device=device)
    diagonal = torch.arange(-num_negative, num_blocks, device=device)[:, None] * block
    back = torch.arange(1, num_backs + 1, device=device)[:, None] * block
    of_history = torch.stack([diagonal + step, diagonal + step - block], dim=1)
    of_candidates = torch.stack([back - step, torch.zeros_like(back - step)], dim=1)
    return torch.cat([of_history, of_candidates]).clamp(-reach, reach) + reach
