"""SiLU of columns of the projection, and its gradient, on strided views of one buffer.

Forward:  y = silu(z)
Backward: dz = dy * silu'(z) or dy,  db = sum(dz) over rows, as partial sums in a fixed order

The gradients of U, V, Q and K come from different operators, each in its own buffer. Here each is
read once and written to its columns of the one dUVQK that both products of the projection read: no
copy puts them together.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from kernels._triton.rows import num_programs
from kernels._triton.silu import is_fast, silu, silu_derivative


@triton.jit
def _silu_kernel(
    z_ptr,
    y_ptr,
    L,
    stride_z,
    F,
    ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    FAST: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (rows < L)[:, None] & (cols < F)[None, :]
    z = tl.load(z_ptr + rows[:, None] * stride_z + cols[None, :], mask=mask, other=0.0)
    y = silu(z.to(tl.float32), FAST).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + rows[:, None] * F + cols[None, :], y, mask=mask)


@triton.jit
def _silu_bwd_kernel(
    dy_ptr,
    z_ptr,
    dz_ptr,
    dbias_ptr,
    L,
    stride_dy,
    stride_z,
    stride_dz,
    stride_dbias,
    F,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    FAST: tl.constexpr,
):
    pid = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    dbias = tl.zeros((ROWS, BLOCK_F), tl.float32)
    for block in range(pid, tl.cdiv(L, ROWS), tl.num_programs(0)):
        rows = block * ROWS + tl.arange(0, ROWS).to(tl.int64)
        mask = (rows < L)[:, None] & (cols < F)[None, :]
        dz = tl.load(dy_ptr + rows[:, None] * stride_dy + cols[None, :], mask=mask, other=0.0)
        dz = dz.to(tl.float32)
        if SILU:
            z = tl.load(z_ptr + rows[:, None] * stride_z + cols[None, :], mask=mask, other=0.0)
            dz *= silu_derivative(z.to(tl.float32), FAST)
        dbias += dz
        offs = rows[:, None] * stride_dz + cols[None, :]
        tl.store(dz_ptr + offs, dz.to(dz_ptr.dtype.element_ty), mask=mask)
    offs = pid.to(tl.int64) * stride_dbias + cols
    tl.store(dbias_ptr + offs, tl.sum(dbias, 0), mask=cols < F)


def silu_fwd(z: Tensor) -> Tensor:
    """Return silu(z), (L, F), the very bits that the epilogue of the projection gives.

    Args:
        z: (L, F), columns contiguous.
    """
    if z.dtype == torch.float32:
        return functional.silu(z)  # as kernels/linear has it
    L, F = z.shape
    y = z.new_empty(L, F)
    rows, block_f = _tile(F)
    if L > 0:
        _silu_kernel[(triton.cdiv(L, rows), triton.cdiv(F, block_f))](
            z,
            y,
            L,
            z.stride(0),
            F,
            ROWS=rows,
            BLOCK_F=block_f,
            FAST=is_fast(z.dtype),
            num_warps=4,
        )
    return y


def silu_bwd(parts: list[Tensor], z: Tensor, silu_columns: int) -> tuple[Tensor, Tensor]:
    """Return dz (L, F) in one buffer, and its sum over rows (F,) in float32.

    Args:
        parts: gradients of neighbouring columns of silu(z), each (L, any), columns contiguous.
        z: (L, F), columns contiguous.
        silu_columns: how many first columns have SiLU, whole parts.
    """
    L, F = z.shape
    dz = z.new_empty(L, F)
    rows, block_f = _tile(max(dy.shape[1] for dy in parts))
    tiles_f = triton.cdiv(max(dy.shape[1] for dy in parts), block_f)
    blocks = triton.cdiv(L, rows)
    programs = min(blocks, triton.cdiv(num_programs(z.device, blocks * tiles_f, 4), tiles_f))
    dbias = z.new_empty(programs, F, dtype=torch.float32)
    first = 0
    for dy in parts:
        width = dy.shape[1]
        columns = slice(first, first + width)
        if L > 0:
            _silu_bwd_kernel[(programs, triton.cdiv(width, block_f))](
                dy,
                z[:, columns],
                dz[:, columns],
                dbias[:, columns],
                L,
                dy.stride(0),
                z.stride(0),
                F,
                F,
                width,
                SILU=first < silu_columns,
                ROWS=rows,
                BLOCK_F=block_f,
                FAST=is_fast(z.dtype),
                num_warps=4,
            )
        first += width
    return dz, dbias.sum(0)


def _tile(F: int) -> tuple[int, int]:
    """Return (rows, columns) of a block: 4096 elements."""
    block_f = min(512, triton.next_power_of_2(F))
    return 4096 // block_f, block_f
