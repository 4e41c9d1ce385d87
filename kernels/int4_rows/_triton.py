"""4-bit rows to floating rows: y = value * scale + bias, each row read once and written once.

A byte holds the even column in its low half. The result is written as two interleaved halves; the
rows may lie in page-locked host memory, which a GPU reads over the bus, by their number.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.int4_rows.reference import CONSTANTS

VALUES = 4096
"""Columns of all rows that a program holds."""


@triton.jit
def _dequantize_int4_kernel(
    rows_ptr,
    constants_ptr,
    index_ptr,
    out_ptr,
    R,
    E,
    P: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    offs_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offs_p = tl.arange(0, BLOCK_P)
    mask_r = offs_r < R
    row = offs_r
    if HAS_INDEX:
        row = tl.load(index_ptr + offs_r, mask=mask_r, other=0)
    exists = mask_r & (row >= 0) & (row < E)
    mask = exists[:, None] & (offs_p < P)[None, :]
    packed = tl.load(rows_ptr + row[:, None] * (P + 4) + offs_p[None, :], mask=mask, other=0)
    at = row * ((P + 4) // 2) + P // 2
    missing = float("nan")
    scale = tl.load(constants_ptr + at, mask=exists, other=missing).to(tl.float32)
    bias = tl.load(constants_ptr + at + 1, mask=exists, other=missing).to(tl.float32)
    # Two roundings, as the reference and FBGEMM's CPU code have them.
    even = (packed & 15).to(tl.float32) * scale[:, None] + bias[:, None]
    odd = (packed >> 4).to(tl.float32) * scale[:, None] + bias[:, None]
    both = tl.interleave(even, odd)
    offs_d = tl.arange(0, 2 * BLOCK_P)
    out = out_ptr + offs_r[:, None] * (2 * P) + offs_d[None, :]
    mask_out = mask_r[:, None] & (offs_d < 2 * P)[None, :]
    tl.store(out, both.to(out_ptr.dtype.element_ty), mask=mask_out)


def dequantize_int4(rows: Tensor, index: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Launch the kernel.

    Args:
        rows: (E, W) uint8, contiguous, on the GPU or page-locked.
        index: (R,) int64 on the GPU, contiguous; None: every row, in order.
        dtype: of the result.
    """
    E, W = rows.shape
    P = W - CONSTANTS
    device = rows.device if index is None else index.device
    R = E if index is None else len(index)
    out = torch.empty((R, 2 * P), dtype=dtype, device=device)
    if out.numel() == 0:
        return out
    block = triton.next_power_of_2(P)
    num_rows = max(1, VALUES // (2 * block))
    _dequantize_int4_kernel[(triton.cdiv(R, num_rows),)](
        rows,
        rows.view(torch.float16),
        index,
        out,
        R,
        E,
        P=P,
        HAS_INDEX=index is not None,
        ROWS=num_rows,
        BLOCK_P=block,
        num_warps=4,
    )
    return out
