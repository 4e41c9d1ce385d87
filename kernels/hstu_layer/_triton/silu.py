"""SiLU of columns of the projection, and its gradient, on strided views of one buffer.

Forward:  y = turn(silu(z)) or turn(z)
Backward: dz = back(f dy) * silu'(z) or back(f dy), f a factor,  db = sum(dz) over rows, as partial
          sums in a fixed order

Queries and keys alone are turned, if anything, by rotary angles (kernels/_triton/turn.py), and
their gradients back.

The gradients of V, Q and K come from the attention, each in its own buffer. Here each is read once
and written to its columns of the one dUVQK that both products of the projection read: no copy puts
them together. U's columns are the gated norm's, whose backward kernel writes them there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.launch import launch
from kernels._triton.rows import num_programs
from kernels._triton.silu import is_fast, silu, silu_derivative
from kernels._triton.sizes import cdiv, next_power_of_2
from kernels._triton.turn import turn
from kernels.rotary.columns import Turn, turn_arguments


@triton.jit(do_not_specialize=["L"])
def _silu_kernel(
    z_ptr,
    y_ptr,
    L,
    stride_z,
    F,
    q_cos_ptr,
    q_sin_ptr,
    q_first,
    k_cos_ptr,
    k_sin_ptr,
    k_first,
    SILU: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    PER_HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    FAST: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * BLOCK_F
    cols = first + tl.arange(0, BLOCK_F)
    mask = (rows < L)[:, None] & (cols < F)[None, :]
    z = tl.load(z_ptr + rows[:, None] * stride_z + cols[None, :], mask=mask, other=0.0)
    y = z.to(tl.float32)
    if SILU:
        y = silu(y, FAST)
    if q_cos_ptr is not None:
        y = turn(
            y, rows, first, L, q_cos_ptr, q_sin_ptr, q_first, H, K, PER_HEAD, False, ROWS, BLOCK_F
        )
    if k_cos_ptr is not None:
        y = turn(
            y, rows, first, L, k_cos_ptr, k_sin_ptr, k_first, H, K, PER_HEAD, False, ROWS, BLOCK_F
        )
    y = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + rows[:, None] * F + cols[None, :], y, mask=mask)


@triton.jit(do_not_specialize=["L"])
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
    factor,
    cos_ptr,
    sin_ptr,
    turn_first,
    SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    PER_HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    FAST: tl.constexpr,
):
    pid = tl.program_id(0)
    first = tl.program_id(1) * BLOCK_F
    cols = first + tl.arange(0, BLOCK_F)
    dbias = tl.zeros((ROWS, BLOCK_F), tl.float32)
    for block in range(pid, tl.cdiv(L, ROWS), tl.num_programs(0)):
        rows = block * ROWS + tl.arange(0, ROWS).to(tl.int64)
        mask = (rows < L)[:, None] & (cols < F)[None, :]
        dz = tl.load(dy_ptr + rows[:, None] * stride_dy + cols[None, :], mask=mask, other=0.0)
        dz = dz.to(tl.float32) * factor
        if cos_ptr is not None:
            dz = turn(
                dz, rows, first, L, cos_ptr, sin_ptr, turn_first, H, K, PER_HEAD, True,
                ROWS, BLOCK_F,
            )  # fmt: skip
        if SILU:
            z = tl.load(z_ptr + rows[:, None] * stride_z + cols[None, :], mask=mask, other=0.0)
            dz *= silu_derivative(z.to(tl.float32), FAST)
        if HAS_BIAS:
            dbias += dz
        offs = rows[:, None] * stride_dz + cols[None, :]
        tl.store(dz_ptr + offs, dz.to(dz_ptr.dtype.element_ty), mask=mask)
    if HAS_BIAS:
        offs = pid.to(tl.int64) * stride_dbias + cols
        tl.store(dbias_ptr + offs, tl.sum(dbias, 0), mask=cols < F)


def silu_fwd(
    z: Tensor, *, has_silu: bool = True, turns: tuple[Turn | None, Turn | None] = (None, None)
) -> Tensor:
    """Return silu(z), (L, F), in 16 bits the very bits that the epilogue of a product gives.

    Args:
        z: (L, F), columns contiguous.
        has_silu: False for z itself, but turned.
        turns: which columns are turned, if any.
    """
    L, F = z.shape
    y = z.new_empty(L, F)
    rows, block_f = _tile(F)
    turned, heads = turn_arguments(*turns)
    if L > 0:
        launch(
            _silu_kernel,
            (cdiv(L, rows), cdiv(F, block_f), 1),
            [
                z,
                y,
                L,
                z.stride(0),
                F,
                *turned,
            ],
            {
                "SILU": has_silu,
                **heads,
                "ROWS": rows,
                "BLOCK_F": block_f,
                "FAST": is_fast(z.dtype),
            },
            num_warps=4,
        )
    return y


def silu_bwd(
    parts: list[Tensor],
    z: Tensor,
    dz: Tensor,
    *,
    has_silu: bool,
    has_bias: bool,
    turns: list[Turn | None] | None = None,
    factors: list[float] | None = None,
) -> Tensor:
    """Fill the last columns of dz; return their sum over rows in float32, zero unless `has_bias`.

    Args:
        parts: gradients of the last columns of the projection, neighbours, each (L, any), columns
            contiguous.
        z: (L, F), columns contiguous.
        dz: (L, F), columns contiguous; may be z itself.
        has_silu: whether these are gradients of silu(z), or of z.
        has_bias: whether the sum is wanted.
        turns: how each part was turned, in columns of its own.
        factors: what each part is multiplied by first.
    """
    (L, F), widths = z.shape, [dy.shape[1] for dy in parts]
    first = F - sum(widths)
    rows, block_f = _tile(max(widths))
    tiles_f = cdiv(max(widths), block_f)
    blocks = cdiv(L, rows)
    # As many as run at once, by 46 registers a thread, 90 with sums.
    programs = num_programs(z.device, blocks * tiles_f, 5 if has_bias else 10)
    programs = min(blocks, cdiv(programs, tiles_f))
    dbias = z.new_empty(programs if has_bias else 0, sum(widths), dtype=torch.float32)
    done = 0
    of_parts = zip(
        parts, widths, turns or [None] * len(parts), factors or [1.0] * len(parts), strict=True
    )
    for dy, width, turned, factor in of_parts:
        angles, heads = turn_arguments(turned)
        columns = slice(first + done, first + done + width)
        if L > 0:
            launch(
                _silu_bwd_kernel,
                (programs, cdiv(width, block_f), 1),
                [
                    dy,
                    z[:, columns],
                    dz[:, columns],
                    dbias[:, done : done + width],
                    L,
                    dy.stride(0),
                    z.stride(0),
                    dz.stride(0),
                    dbias.stride(0),
                    width,
                    factor,
                    *angles,
                ],
                {
                    "SILU": has_silu,
                    "HAS_BIAS": has_bias,
                    **heads,
                    "ROWS": rows,
                    "BLOCK_F": block_f,
                    "FAST": is_fast(z.dtype),
                },
                num_warps=4,
            )
        done += width
    return dbias.sum(0)


def _tile(F: int) -> tuple[int, int]:
    """Return (rows, columns) of a block: 4096 elements."""
    block_f = min(512, next_power_of_2(F))
    return 4096 // block_f, block_f
