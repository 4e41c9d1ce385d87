"""What the launchers share: a call as kernels take it, and block sizes."""

import functools
import os
import weakref
from typing import Any, Literal

import torch
import triton
from torch import Tensor

from kernels._triton.silu import is_fast
from kernels.hstu_attention._triton.mask import mask_constants
from kernels.hstu_attention.bias import time_thresholds
from kernels.hstu_attention.structure import Structure

Pass = Literal["forward", "query_grad", "key_grad", "bias_grad"]


def kernel_inputs(structure: Structure) -> tuple[Tensor | None, ...]:
    """Return the kernel arguments order_ptr .. key_time_ptr."""
    return (
        longest_first(structure.offsets),
        structure.offsets,
        structure.q_offsets,
        structure.num_candidates,
        structure.position_table,
        structure.time_table,
        time_threshold_tensor(structure),
        structure.query_time,
        structure.key_time,
    )


def longest_first(offsets: Tensor) -> Tensor:
    """Return (B,) int64: the sequences by falling length, so that no long one is started last.

    What was sorted last is kept: the layers of a model, forward and backward, ask for one batch,
    and a sort of a hundred numbers is six kernels. A CUDA graph sorts for itself: it reads other
    offsets each time.
    """
    global _sorted
    of, when, order = _sorted
    now = offsets._version, is_captured(offsets)
    if of() is not offsets or when != now:
        order = offsets.diff().argsort(descending=True)
        _sorted = weakref.ref(offsets), now, order
    return order


def is_captured(x: Tensor) -> bool:
    """Return whether what is done with x now goes into a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


_sorted: tuple[Any, tuple[int, bool], Tensor] = (lambda: None, (0, False), torch.empty(0))
"""Offsets, weakly, their version and whether a graph was captured, and their order."""


def kernel_constants(q: Tensor, v: Tensor, structure: Structure) -> dict[str, Any]:
    """Return the compile-time constants that do not depend on block sizes."""
    position, time = structure.position_table, structure.time_table
    return {
        "SOFTMAX": structure.softmax,
        "FAST": is_fast(q.dtype),
        "REACH": 0 if position is None else position.numel() // 2,
        "NUM_BUCKETS": 0 if time is None else time.numel() - 1,
        "H": q.shape[1],
        "K": q.shape[2],
        "V": v.shape[2],
        # tl.dot needs 16.
        "BLOCK_K": max(16, triton.next_power_of_2(q.shape[2])),
        "BLOCK_V": max(16, triton.next_power_of_2(v.shape[2])),
        **mask_constants(structure.mask),
    }


def kernel_blocks(kind: Pass, q: Tensor, v: Tensor, structure: Structure) -> dict[str, int]:
    """Return the block sizes of a pass."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        # Small, so that short sequences have several; unequal, so that a mix-up shows.
        return _blocks(32, 16, 1, 4)
    dim = max(q.shape[2], v.shape[2])
    if q.dtype == torch.float32:
        return _blocks(32, 32, 1, 4 if dim <= 128 else 8)
    if structure.position_table is not None:
        # Gathers need registers, and pipelining would stage them in shared memory.
        looped = 64 if dim <= 128 else 32
        if kind == "bias_grad":
            # On one H100, D=128: 1.8 ms where 8 warps take 2.5 and more stages are no faster.
            return _blocks(looped, 64, 1, 4 if dim <= 128 else 8)
        return _blocks(looped, 64, 1, 8) if kind == "key_grad" else _blocks(64, looped, 1, 8)
    return next(blocks for limit, blocks in _BLOCKS[kind] if dim <= limit)


def _blocks(m: int, n: int, stages: int, warps: int) -> dict[str, int]:
    return {"BLOCK_M": m, "BLOCK_N": n, "STAGES": stages, "num_warps": warps}


_BLOCKS = {
    "forward": [
        (64, _blocks(128, 64, 3, 4)),
        (128, _blocks(128, 64, 3, 8)),
        (256, _blocks(128, 64, 2, 8)),
    ],
    "query_grad": [
        (64, _blocks(64, 64, 2, 4)),
        (128, _blocks(64, 64, 2, 4)),
        (256, _blocks(64, 32, 2, 8)),
    ],
    "key_grad": [
        (64, _blocks(64, 64, 2, 4)),
        (128, _blocks(64, 64, 2, 4)),
        (256, _blocks(32, 64, 2, 8)),
    ],
}
"""By pass: largest of K and V, and the blocks up to it (float16 and bfloat16)."""


def time_threshold_tensor(structure: Structure) -> Tensor | None:
    """Return the smallest difference of each time bucket, or None without a time table."""
    if structure.time_table is None:
        return None
    return time_thresholds_on(structure.time_table.numel() - 1, structure.offsets.device)


@functools.cache
def time_thresholds_on(num_buckets: int, device: torch.device) -> Tensor:
    """Return (max(T, 1),) int64 on the device, copied there once: a copy waits for the GPU."""
    return torch.tensor(time_thresholds(num_buckets) or [0], dtype=torch.int64, device=device)
