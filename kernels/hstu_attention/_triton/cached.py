"""Attention over cached keys: few queries, many keys, so that programs share the keys out.

A program computes one block of queries of one head over one share of the cached keys, which lie in
pages; the last share has the keys of the new tokens too. Shares are added up in a second kernel.

Letters: B sequences, R new tokens, G pages of a sequence, S shares, H heads, K dim of q and k,
V dim of v.
"""

import functools
import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.silu import is_fast, silu
from kernels.hstu_attention._triton.launch import time_thresholds_on
from kernels.hstu_attention._triton.mask import mask_constants, pick2, visible
from kernels.hstu_attention._triton.tile import load_rows, load_times, relative_bias, store_rows
from kernels.hstu_attention.bias import RelativeBias
from kernels.hstu_attention.mask import AttentionMask

LEAST_BLOCKS = 4
"""Blocks of keys that a share has at least."""
FEW_ROWS = 256
"""Queries of all, up to which blocks are of 64: 144 over 8,192 keys take 26 us, 32 in blocks of 128
(one H200, 4 heads of 128)."""
SMALL_BLOCKS = 1.19
"""Of many queries, time of blocks of 64 for as many products as blocks of 128 make."""


@triton.jit
def _seen(
    row, col, length, history,
    NUM_CONTEXT: tl.constexpr, CONTEXT: tl.constexpr, WINDOW: tl.constexpr,
    GLOBAL_ROWS: tl.constexpr, GLOBAL_COLUMNS: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    seen = visible(
        row, col, length, history, NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS
    )
    if WINDOWED:
        near = (history - col <= WINDOW) | (col < NUM_CONTEXT + GLOBAL_COLUMNS) | (col >= history)
        seen = seen & (near | (row < history))
    return seen


@triton.jit
def _add_block(
    q, k, v, row, col, length, history, query_time, key_time, acc, row_max, row_sum,
    alpha, position_ptr, time_ptr, threshold_ptr,
    MASKED: tl.constexpr, SOFTMAX: tl.constexpr, FAST: tl.constexpr, REACH: tl.constexpr,
    NUM_BUCKETS: tl.constexpr,
    NUM_CONTEXT: tl.constexpr, CONTEXT: tl.constexpr, WINDOW: tl.constexpr,
    GLOBAL_ROWS: tl.constexpr, GLOBAL_COLUMNS: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Add one block of keys to the running sums; rows of k and v past the end are zeros."""
    score = tl.dot(q, tl.trans(k), input_precision="ieee") * alpha
    if position_ptr is not None:
        score += relative_bias(
            row[:, None], col[None, :], history, query_time[:, None], key_time[None, :],
            position_ptr, time_ptr, threshold_ptr, REACH, NUM_BUCKETS,
        )  # fmt: skip
    if MASKED:
        seen = _seen(
            row[:, None], col[None, :], length, history,
            NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS, WINDOWED,
        )  # fmt: skip
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
    acc = tl.dot(weight.to(v.dtype), v, acc, input_precision="ieee")
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["num_blocks", "num_pages", "num_rows"])
def _cached_kernel(
    q_ptr, k_ptr, v_ptr, cached_k_ptr, cached_v_ptr, out_ptr, max_ptr, sum_ptr,
    pages_ptr, lengths_ptr, offsets_ptr, num_candidates_ptr,
    position_ptr, time_ptr, threshold_ptr, query_time_ptr, key_time_ptr, cached_time_ptr,
    stride_qr, stride_qh, stride_kr, stride_kh, stride_vr, stride_vh,
    stride_ck, stride_ckh, stride_cv, stride_cvh,
    num_rows, num_blocks, num_pages, alpha, scale,
    SPLITS: tl.constexpr, SOFTMAX: tl.constexpr, FAST: tl.constexpr, REACH: tl.constexpr,
    NUM_BUCKETS: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PAGE: tl.constexpr,
    NUM_CONTEXT: tl.constexpr, CONTEXT: tl.constexpr, WINDOW: tl.constexpr,
    GLOBAL_ROWS: tl.constexpr, GLOBAL_COLUMNS: tl.constexpr, WINDOWED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    split = pid % SPLITS
    head = (pid // SPLITS) % H
    block = (pid // (SPLITS * H)) % num_blocks
    b = pid // (SPLITS * H) // num_blocks
    start = tl.load(offsets_ptr + b)
    num_new = (tl.load(offsets_ptr + b + 1) - start).to(tl.int32)
    first = block * BLOCK_M
    if first < num_new:
        num_cached = tl.load(lengths_ptr + b).to(tl.int32)
        length = num_cached + num_new
        history = length
        if num_candidates_ptr is not None:
            history = length - tl.load(num_candidates_ptr + b).to(tl.int32)
        q_base = q_ptr + start * stride_qr + head * stride_qh
        q = load_rows(q_base, first, num_new, stride_qr, K, BLOCK_M, BLOCK_K)
        row = num_cached + first + tl.arange(0, BLOCK_M)
        query_time = row
        if time_ptr is not None:
            query_time = load_times(query_time_ptr, start, first, num_new, BLOCK_M)
        acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)

        # Cached blocks that some row sees: the first, despite the window, and those from `near` on.
        cached_blocks = tl.cdiv(num_cached, BLOCK_N)
        near = 0
        if WINDOW >= 0:
            windowed = num_cached + tl.minimum(first + BLOCK_M, num_new) <= history - GLOBAL_ROWS
            if WINDOWED:
                windowed = True
            if windowed:
                oldest = tl.minimum(num_cached + first, history) - WINDOW
                near = tl.minimum(tl.maximum(oldest, 0) // BLOCK_N, cached_blocks)
        far_blocks: tl.constexpr = (NUM_CONTEXT + GLOBAL_COLUMNS + BLOCK_N - 1) // BLOCK_N
        far = tl.minimum(far_blocks, near)
        visited = far + cached_blocks - near
        share = tl.cdiv(visited, SPLITS)
        begin = split * share
        end = tl.minimum(begin + share, visited)
        cols = tl.arange(0, BLOCK_N)
        for i in tl.range(begin, end, num_stages=STAGES):
            key_first = pick2(i, 0, far, near) * BLOCK_N
            page = tl.load(pages_ptr + b * num_pages + key_first // PAGE).to(tl.int64)
            at = page * PAGE + key_first % PAGE
            left = num_cached - key_first
            k = load_rows(
                cached_k_ptr + at * stride_ck + head * stride_ckh, 0, left, stride_ck,
                K, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            v = load_rows(
                cached_v_ptr + at * stride_cv + head * stride_cvh, 0, left, stride_cv,
                V, BLOCK_N, BLOCK_V,
            )  # fmt: skip
            key_time = cols
            if time_ptr is not None:
                key_time = tl.load(cached_time_ptr + at + cols, mask=cols < left, other=0)
            # What lies past the end is no key: its value is zero, and for softmax it is hidden, as
            # `length` ends the cached ones here.
            acc, row_max, row_sum = _add_block(
                q, k, v, row, tl.where(cols < left, key_first + cols, length),
                length, history, query_time, key_time,
                acc, row_max, row_sum, alpha, position_ptr, time_ptr, threshold_ptr,
                SOFTMAX or WINDOW >= 0, SOFTMAX, FAST, REACH, NUM_BUCKETS,
                NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS, WINDOWED,
            )  # fmt: skip

        if split == SPLITS - 1:
            # Of the new tokens: history up to the rows, then the rows themselves.
            events = history - num_cached
            seen_end = tl.minimum(first + BLOCK_M, num_new)
            event_blocks = tl.cdiv(tl.minimum(events, tl.maximum(seen_end, NUM_CONTEXT)), BLOCK_N)
            own = tl.maximum(first // BLOCK_N, event_blocks)
            own_blocks = tl.maximum(tl.cdiv(seen_end, BLOCK_N) - own, 0)
            for i in tl.range(0, event_blocks + own_blocks, num_stages=1):
                key_first = pick2(i, 0, event_blocks, own) * BLOCK_N
                k_base = k_ptr + start * stride_kr + head * stride_kh
                v_base = v_ptr + start * stride_vr + head * stride_vh
                k = load_rows(k_base, key_first, num_new, stride_kr, K, BLOCK_N, BLOCK_K)
                v = load_rows(v_base, key_first, num_new, stride_vr, V, BLOCK_N, BLOCK_V)
                key_time = cols
                if time_ptr is not None:
                    key_time = load_times(key_time_ptr, start, key_first, num_new, BLOCK_N)
                acc, row_max, row_sum = _add_block(
                    q, k, v, row, num_cached + key_first + cols,
                    length, history, query_time, key_time,
                    acc, row_max, row_sum, alpha, position_ptr, time_ptr, threshold_ptr,
                    True, SOFTMAX, FAST, REACH, NUM_BUCKETS,
                    NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS, WINDOWED,
                )  # fmt: skip

        rows = first + tl.arange(0, BLOCK_M)
        if SOFTMAX:
            if SPLITS > 1:
                at_row = (split * num_rows + start + rows) * H + head
                tl.store(max_ptr + at_row, row_max, mask=rows < num_new)
                tl.store(sum_ptr + at_row, row_sum, mask=rows < num_new)
            else:
                acc = acc / row_sum[:, None]
        else:
            acc = acc * scale
        out_base = out_ptr + (split * num_rows + start) * (H * V) + head * V
        store_rows(out_base, first, num_new, H * V, acc, V, BLOCK_M, BLOCK_V)


@triton.jit(do_not_specialize=["num_pairs"])
def _combine_kernel(
    part_ptr, max_ptr, sum_ptr, out_ptr, num_pairs,
    SPLITS: tl.constexpr, SOFTMAX: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up the shares of pairs of row and head."""
    pair = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    cols = tl.arange(0, BLOCK_V)
    inside = pair < num_pairs
    mask = inside[:, None] & (cols < V)[None, :]
    at = pair[:, None] * V + cols[None, :]
    acc = tl.zeros([BLOCK, BLOCK_V], tl.float32)
    if SOFTMAX:
        top = tl.full([BLOCK], float("-inf"), tl.float32)
        for s in tl.static_range(SPLITS):
            top = tl.maximum(top, tl.load(max_ptr + s * num_pairs + pair, mask=inside, other=0.0))
        total = tl.zeros([BLOCK], tl.float32)
        for s in tl.static_range(SPLITS):
            shrink = tl.exp(tl.load(max_ptr + s * num_pairs + pair, mask=inside, other=0.0) - top)
            total += shrink * tl.load(sum_ptr + s * num_pairs + pair, mask=inside, other=1.0)
            part = tl.load(part_ptr + s * num_pairs * V + at, mask=mask, other=0.0)
            acc += shrink[:, None] * part
        acc = acc / total[:, None]
    else:
        for s in tl.static_range(SPLITS):
            acc += tl.load(part_ptr + s * num_pairs * V + at, mask=mask, other=0.0)
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=mask)


def hstu_attention_cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    cached: Any,
    *,
    max_len: int,
    alpha: float,
    scaling_length: float | None,
    softmax: bool,
    mask: AttentionMask,
    num_candidates: Tensor | None,
    bias: RelativeBias | None,
    page: int,
) -> Tensor:
    """Return (R, H, V): the operator, whose arguments these are."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    (R, H, K), V = q.shape, v.shape[2]
    num_sequences = offsets.numel() - 1
    out = q.new_empty(R, H, V)
    if not R:
        return out
    blocks = _blocks(q, v, max_len, num_sequences, has_bias=bias is not None)
    num_blocks = triton.cdiv(max_len, blocks["BLOCK_M"])
    programs = num_blocks * num_sequences * H
    # About as many of those programs have queries: blocks of a short sequence have none.
    working = min(num_blocks * num_sequences, triton.cdiv(R, blocks["BLOCK_M"])) * H
    # Two small programs run on a processor at a time.
    wanted = _processors(q.device) * (1.5 if blocks["BLOCK_M"] == 64 and bias is None else 1.0)
    splits = _splits(wanted / working, triton.cdiv(cached.max_len, blocks["BLOCK_N"]))
    part = out if splits == 1 else q.new_empty(splits, R, H, V, dtype=torch.float32)
    top = total = part
    if softmax and splits > 1:
        top, total = q.new_empty(2, splits, R, H, dtype=torch.float32)
    position = time = threshold = query_time = key_time = cached_time = None
    if bias is not None:
        position, time = bias.position_table.contiguous(), bias.time_table
        if time is not None:
            time, cached_time = time.contiguous(), cached.time
            query_time, key_time = bias.query_time, bias.key_time
            threshold = time_thresholds_on(time.numel() - 1, q.device)
    dims = {
        "K": K,
        "V": V,
        "BLOCK_K": max(16, triton.next_power_of_2(K)),
        "BLOCK_V": max(16, triton.next_power_of_2(V)),
    }
    _cached_kernel[(programs * splits,)](
        q, k, v, cached.k, cached.v, part, top, total,
        cached.pages, cached.lengths, offsets, num_candidates,
        position, time, threshold, query_time, key_time, cached_time,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        *cached.k.stride()[:2], *cached.v.stride()[:2],
        R, num_blocks, cached.pages.shape[1], float(alpha),
        1.0 if scaling_length is None else 1.0 / scaling_length,
        SPLITS=splits, SOFTMAX=softmax, FAST=is_fast(q.dtype),
        REACH=0 if position is None else position.numel() // 2,
        NUM_BUCKETS=0 if time is None else time.numel() - 1,
        H=H, PAGE=page, **dims, **mask_constants(mask), WINDOWED=mask.windowed_candidates,
        **blocks,
    )  # fmt: skip
    if splits > 1:
        rows = 16
        _combine_kernel[(triton.cdiv(R * H, rows),)](
            part, top, total, out, R * H,
            SPLITS=splits, SOFTMAX=softmax, V=V, BLOCK_V=dims["BLOCK_V"], BLOCK=rows,
        )  # fmt: skip
    return out


def _blocks(
    q: Tensor, v: Tensor, max_len: int, num_sequences: int, *, has_bias: bool
) -> dict[str, int]:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return {"BLOCK_M": 32, "BLOCK_N": 16, "STAGES": 1, "num_warps": 4}
    dim = max(q.shape[2], v.shape[2])
    if q.dtype == torch.float32:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "STAGES": 1, "num_warps": 4 if dim <= 128 else 8}
    if has_bias:
        looped = 64 if dim <= 128 else 32
        return {"BLOCK_M": 64, "BLOCK_N": looped, "STAGES": 1, "num_warps": 8}
    stages = 3 if dim <= 128 else 2
    # Graphs have one more sequence, of what is left over.
    rows = triton.cdiv(len(q), max(1, num_sequences - 1))
    is_less = SMALL_BLOCKS * 64 * triton.cdiv(rows, 64) < 128 * triton.cdiv(rows, 128)
    if max_len <= 64 or len(q) <= FEW_ROWS or is_less:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "STAGES": stages, "num_warps": 4}
    return {"BLOCK_M": 128, "BLOCK_N": 64, "STAGES": stages, "num_warps": 4 if dim <= 64 else 8}


def _splits(wanted: float, key_blocks: int) -> int:
    """Return into how many shares the cached keys go: about those wanted, not too small.

    A power of two: each is compiled.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        return max(1, min(3, key_blocks // 2))
    most = max(1, min(round(wanted), key_blocks // LEAST_BLOCKS, 64))
    return 1 << (most.bit_length() - 1)


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # the interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count
