"""Row-wise quantisation to fp8 e4m3, one read and one write of a row; transposition of the bytes.

The bits are those of the reference: kernels/_triton/fp8.py says how a row is rounded.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.fp8 import pack_e4m3, quantize_tile
from kernels._triton.rows import forward_tile
from kernels._triton.sizes import cdiv
from kernels.quantize.reference import padded_tokens

BLOCK_L, BLOCK_D = 128, 128
"""Tile that is transposed at a time."""


@triton.jit(do_not_specialize=["L"])
def _quantize_rows_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    L,
    stride_x,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    mask = (rows < L)[:, None] & (cols < D)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_x + cols[None, :], mask=mask, other=0.0)
    q, scale = quantize_tile(x.to(tl.float32))
    tl.store(q_ptr + rows[:, None] * D + cols[None, :], q, mask=mask)
    tl.store(scale_ptr + rows, scale, mask=rows < L)


@triton.jit
def _tokens(q_ptr, factor_ptr, tokens, cols, L, D, FOLD: tl.constexpr):
    """Return (tokens, cols) as float32 if FOLD, times the factor of each token, else as bytes."""
    mask = (tokens < L)[:, None] & (cols < D)[None, :]
    offs = tokens.to(tl.int64)[:, None] * D + cols[None, :]
    if FOLD:
        q = tl.load(q_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        return q * tl.load(factor_ptr + tokens, mask=tokens < L, other=0.0)[:, None]
    else:
        return tl.load(q_ptr + offs, mask=mask, other=0).to(tl.int32)


@triton.jit
def _transpose_kernel(
    q_ptr,
    factor_ptr,
    out_ptr,
    L,
    D,
    words,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FOLD: tl.constexpr,
):
    # Four tokens make one word of the result.
    tiles_d = tl.cdiv(D, BLOCK_D)
    word = (tl.program_id(0) // tiles_d) * (BLOCK_L // 4) + tl.arange(0, BLOCK_L // 4)
    cols = (tl.program_id(0) % tiles_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    token = word * 4
    a = _tokens(q_ptr, factor_ptr, token, cols, L, D, FOLD)
    b = _tokens(q_ptr, factor_ptr, token + 1, cols, L, D, FOLD)
    c = _tokens(q_ptr, factor_ptr, token + 2, cols, L, D, FOLD)
    d = _tokens(q_ptr, factor_ptr, token + 3, cols, L, D, FOLD)
    packed = pack_e4m3(a, b, c, d) if FOLD else a | (b << 8) | (c << 16) | (d << 24)
    offs = cols.to(tl.int64)[:, None] * words + word[None, :]
    mask = (cols < D)[:, None] & (word < words)[None, :]
    tl.store(out_ptr + offs, tl.trans(packed), mask=mask)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return q (L, D) float8_e4m3fn and scale (L,) float32. x may have any row stride."""
    L, D = x.shape
    q = x.new_empty(L, D, dtype=torch.float8_e4m3fn)
    scale = x.new_empty(L, dtype=torch.float32)
    if L == 0:
        return q, scale
    rows, columns, warps = forward_tile(D)
    _quantize_rows_kernel[(cdiv(L, rows),)](
        x, q, scale, L, x.stride(0), D=D, ROWS=rows, BLOCK_D=columns, num_warps=warps
    )
    return q, scale


def transpose_rows(q: Tensor, factor: Tensor | None) -> Tensor:
    """Return (D, L padded) float8_e4m3fn from q (L, D), times factor (L,) if there is one."""
    L, D = q.shape
    words = padded_tokens(L) // 4
    out = q.new_empty(D, 4 * words, dtype=torch.float8_e4m3fn)
    if L > 0:
        tiles = cdiv(4 * words, BLOCK_L) * cdiv(D, BLOCK_D)
        _transpose_kernel[(tiles,)](
            q.view(torch.uint8) if factor is None else q,
            factor,
            out.view(torch.int32),
            L,
            D,
            words,
            BLOCK_L=BLOCK_L,
            BLOCK_D=BLOCK_D,
            FOLD=factor is not None,
            num_warps=8,
        )
    return out
