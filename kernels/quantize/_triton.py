"""Row-wise quantisation to fp8 e4m3: one read and one write of each row.

scale = amax / 448,  q = round(x * (448 / amax)), to the nearest, ties to even; both quotients are
correctly rounded, so that the bits are those of the reference.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.rows import forward_tile
from kernels.quantize.reference import LEAST_AMAX, MAX_E4M3


@triton.jit
def _to_e4m3(x, INTERPRETED: tl.constexpr):
    """Return x, at most 448, rounded to e4m3. The interpreter cuts digits off: round before it."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
        # Below 2^-6 e4m3 has steps of 2^-9: a sum with 1.5 * 2^14 keeps that many digits.
        small = (x + 24576.0) - 24576.0
        small = tl.where(small == 0.0, x * 0.0, small)  # Keeps the sign.
        x = tl.where(tl.abs(x) < 0.015625, small, rounded.to(tl.float32, bitcast=True))
    return x.to(tl.float8e4nv)


@triton.jit
def _quantize_rows_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    L,
    stride_x,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MAX_VALUE: tl.constexpr,
    LEAST: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    mask = (rows < L)[:, None] & (cols < D)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_x + cols[None, :], mask=mask, other=0.0)
    x = x.to(tl.float32)
    # A maximum may pass over NaN: count it as infinite.
    amax = tl.max(tl.where(x == x, tl.abs(x), float("inf")), 1)
    finite = amax < float("inf")
    amax = tl.where(finite, tl.maximum(amax, LEAST), 1.0)
    top = tl.full((ROWS,), MAX_VALUE, tl.float32)
    scaled = x * tl.div_rn(top, amax)[:, None]
    scaled = tl.where(finite[:, None], scaled, 0.0)
    q = _to_e4m3(scaled, INTERPRETED)
    tl.store(q_ptr + rows[:, None] * D + cols[None, :], q, mask=mask)
    scale = tl.where(finite, tl.div_rn(amax, top), float("nan"))
    tl.store(scale_ptr + rows, scale, mask=rows < L)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return q (L, D) float8_e4m3fn and scale (L,) float32. x may have any row stride."""
    L, D = x.shape
    q = x.new_empty(L, D, dtype=torch.float8_e4m3fn)
    scale = x.new_empty(L, dtype=torch.float32)
    if L == 0:
        return q, scale
    rows, columns, warps = forward_tile(D)
    _quantize_rows_kernel[(triton.cdiv(L, rows),)](
        x,
        q,
        scale,
        L,
        x.stride(0),
        D=D,
        ROWS=rows,
        BLOCK_D=columns,
        MAX_VALUE=MAX_E4M3,
        LEAST=LEAST_AMAX,
        INTERPRETED=os.environ.get("TRITON_INTERPRET") == "1",
        num_warps=warps,
    )
    return q, scale
