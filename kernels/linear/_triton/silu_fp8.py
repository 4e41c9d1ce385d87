"""Backward pass of SiLU with dz in fp8: one read of dy and z gives dz, its scales and its sum.

Rows are held whole, since a scale belongs to a row; sums over rows as in layer_norm.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.fp8 import quantize_tile
from kernels._triton.rows import num_programs
from kernels._triton.silu import is_fast, silu_derivative


@triton.jit
def _silu_bwd_fp8_kernel(
    dy_ptr,
    z_ptr,
    dz_ptr,
    q_ptr,
    scale_ptr,
    dbias_ptr,
    L,
    stride_dy,
    silu_columns,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    SILU: tl.constexpr,
    KEEP: tl.constexpr,
    FAST: tl.constexpr,
):
    pid = tl.program_id(0)
    cols = tl.arange(0, BLOCK_F)
    dbias = tl.zeros((ROWS, BLOCK_F), tl.float32)
    for block in range(pid, tl.cdiv(L, ROWS), tl.num_programs(0)):
        rows = block * ROWS + tl.arange(0, ROWS).to(tl.int64)
        mask = (rows < L)[:, None] & (cols < F)[None, :]
        offs = rows[:, None] * F + cols[None, :]
        dz = tl.load(dy_ptr + rows[:, None] * stride_dy + cols[None, :], mask=mask, other=0.0)
        dz = dz.to(tl.float32)
        if SILU:
            z = tl.load(z_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            dz *= tl.where((cols < silu_columns)[None, :], silu_derivative(z, FAST), 1.0)
        dbias += dz
        q, scale = quantize_tile(dz)
        tl.store(q_ptr + offs, q, mask=mask)
        tl.store(scale_ptr + rows, scale, mask=rows < L)
        if KEEP:
            tl.store(dz_ptr + offs, dz.to(dz_ptr.dtype.element_ty), mask=mask)
    tl.store(dbias_ptr + pid.to(tl.int64) * F + cols, tl.sum(dbias, 0), mask=cols < F)


def silu_bwd_fp8(
    dy: Tensor, z: Tensor | None, silu_columns: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q (L, F), scale (L,), dz (empty unless `keep`) and dbias (F,) float32.

    Args:
        dy: (L, F), columns contiguous.
        z: (L, F) contiguous; None if silu_columns is 0.
        silu_columns: dz = dy * silu'(z) in so many first columns, dy in the others.
        keep: whether dz is also stored in the dtype of dy.
    """
    L, F = dy.shape
    q = dy.new_empty(L, F, dtype=torch.float8_e4m3fn)
    scale = dy.new_empty(L, dtype=torch.float32)
    dz = dy.new_empty(L if keep else 0, F)
    rows, columns, warps, per_processor = _tile(F)
    programs = num_programs(dy.device, triton.cdiv(L, rows), per_processor)
    dbias = dy.new_empty(programs, F, dtype=torch.float32)
    if L > 0:
        _silu_bwd_fp8_kernel[(programs,)](
            dy,
            z,
            dz if keep else None,
            q,
            scale,
            dbias,
            L,
            dy.stride(0),
            silu_columns,
            F=F,
            ROWS=rows,
            BLOCK_F=columns,
            SILU=silu_columns > 0,
            KEEP=keep,
            FAST=is_fast(dy.dtype),
            num_warps=warps,
        )
    return q, scale, dz, dbias.sum(0)


def _tile(F: int) -> tuple[int, int, int, int]:
    """Return (rows, padded columns, warps, programs a processor): 16 elements a thread."""
    columns = triton.next_power_of_2(F)
    if columns <= 4096:
        return 4096 // columns, columns, 8, 3
    return 1, columns, min(16, columns // 512), 2 if columns <= 8192 else 1
