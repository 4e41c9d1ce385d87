"""Linear map whose epilogue adds the bias, applies SiLU or adds the residual.

Forward:  z = x W^T + b,  y = z | silu(z) | z + residual; silu on the first columns or on all
Backward: dz = dy * silu'(z),  db = sum(dz)  here; dx = dz W and dW = dz^T x are torch's products.

L rows, D input and F output columns. Programs are persistent: one a processor, each computing tiles
in an order that keeps neighbouring tiles in the L2 cache. Tiles travel by TMA where addresses and
row strides are multiples of 16 bytes, else by pointers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels._triton.rows import num_programs
from kernels._triton.silu import is_fast, silu, silu_derivative
from kernels._triton.sizes import cdiv, next_power_of_2
from kernels.linear.reference import silu_first

GROUP = 8
"""Tiles of rows that are computed before the next tile of columns."""
FEW_ROWS = 256
"""Up to so many rows large tiles would leave most processors without one."""


@triton.jit
def _load(source, row, col, stride, num_rows, num_cols, ROWS, COLS, TMA: tl.constexpr):
    """Return a (ROWS, COLS) tile of a descriptor, or of a pointer; zero outside."""
    if TMA:
        return source.load([row, col])
    else:
        rows = row + tl.arange(0, ROWS).to(tl.int64)
        cols = col + tl.arange(0, COLS)
        mask = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
        return tl.load(source + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0)


@triton.jit
def _store(target, value, row, col, num_rows, num_cols, ROWS, COLS, TMA: tl.constexpr):
    """Store a tile in the dtype of a contiguous target."""
    if TMA:
        target.store([row, col], value.to(target.dtype))
    else:
        rows = row + tl.arange(0, ROWS).to(tl.int64)
        cols = col + tl.arange(0, COLS)
        mask = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
        offs = rows[:, None] * num_cols + cols[None, :]
        tl.store(target + offs, value.to(target.dtype.element_ty), mask=mask)


@triton.jit
def _tile_position(tile, tiles_l, tiles_f, GROUP: tl.constexpr):
    group = tile // (GROUP * tiles_f)
    size = min(tiles_l - group * GROUP, GROUP)
    inside = tile % (GROUP * tiles_f)
    return group * GROUP + inside % size, inside // size


@triton.jit
def _epilogue(
    z,
    row,
    col,
    bias_ptr,
    residual,
    x_scale_ptr,
    weight_scale_ptr,
    y,
    kept,
    L,
    F,
    stride_residual,
    silu_columns,
    BLOCK_L: tl.constexpr,
    COLS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SILU: tl.constexpr,
    KEEP: tl.constexpr,
    FAST: tl.constexpr,
    TMA: tl.constexpr,
):
    cols = col + tl.arange(0, COLS)
    if HAS_SCALE:
        rows = row + tl.arange(0, BLOCK_L)
        z *= tl.load(x_scale_ptr + rows, mask=rows < L, other=0.0)[:, None]
        z *= tl.load(weight_scale_ptr + cols, mask=cols < F, other=0.0)[None, :]
    if HAS_BIAS:
        z += tl.load(bias_ptr + cols, mask=cols < F, other=0.0).to(tl.float32)[None, :]
    if KEEP:
        _store(kept, z, row, col, L, F, BLOCK_L, COLS, TMA)
    if SILU:
        # Of the rounded z, kept or not: the backward pass, which has no other, sees the same.
        z = z.to(y.dtype.element_ty if not TMA else y.dtype).to(tl.float32)
        z = tl.where((cols < silu_columns)[None, :], silu(z, FAST), z)
    if HAS_RESIDUAL:
        z += _load(residual, row, col, stride_residual, L, F, BLOCK_L, COLS, TMA).to(tl.float32)
    _store(y, z, row, col, L, F, BLOCK_L, COLS, TMA)


@triton.jit
def _linear_fwd_kernel(
    x,
    weight,
    bias_ptr,
    residual,
    x_scale_ptr,
    weight_scale_ptr,
    y,
    kept,
    L,
    F,
    D,
    stride_x,
    stride_residual,
    silu_columns,
    BLOCK_L: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SILU: tl.constexpr,
    KEEP: tl.constexpr,
    FAST: tl.constexpr,
    TMA: tl.constexpr,
    FLATTEN: tl.constexpr,
    IMPRECISE: tl.constexpr,
):
    programs = tl.num_programs(0)
    tiles_l = tl.cdiv(L, BLOCK_L)
    tiles_f = tl.cdiv(F, BLOCK_F)
    HALF: tl.constexpr = BLOCK_F // 2
    # A second count of the tiles keeps the epilogue apart from the flattened loop: without it the
    # pipeline of the next tile's loads would wait for the stores.
    done = tl.program_id(0) - programs
    for tile in tl.range(tl.program_id(0), tiles_l * tiles_f, programs, flatten=FLATTEN):
        tile_l, tile_f = _tile_position(tile, tiles_l, tiles_f, GROUP)
        z = tl.zeros((BLOCK_L, BLOCK_F), tl.float32)
        for d in range(tl.cdiv(D, BLOCK_D)):
            a = _load(x, tile_l * BLOCK_L, d * BLOCK_D, stride_x, L, D, BLOCK_L, BLOCK_D, TMA)
            b = _load(weight, tile_f * BLOCK_F, d * BLOCK_D, D, F, D, BLOCK_F, BLOCK_D, TMA)
            z = tl.dot(a, b.T, z, max_num_imprecise_acc=IMPRECISE)
        done += programs
        tile_l, tile_f = _tile_position(done, tiles_l, tiles_f, GROUP)
        row = tile_l * BLOCK_L
        col = tile_f * BLOCK_F
        # Half a tile at a time: the whole one does not fit beside the loads in flight.
        left, right = tl.split(tl.permute(tl.reshape(z, (BLOCK_L, 2, HALF)), (0, 2, 1)))
        _epilogue(
            left, row, col, bias_ptr, residual, x_scale_ptr, weight_scale_ptr, y, kept,
            L, F, stride_residual, silu_columns, BLOCK_L, HALF,
            HAS_SCALE, HAS_BIAS, HAS_RESIDUAL, SILU, KEEP, FAST, TMA,
        )  # fmt: skip
        _epilogue(
            right, row, col + HALF, bias_ptr, residual, x_scale_ptr, weight_scale_ptr, y, kept,
            L, F, stride_residual, silu_columns, BLOCK_L, HALF,
            HAS_SCALE, HAS_BIAS, HAS_RESIDUAL, SILU, KEEP, FAST, TMA,
        )  # fmt: skip


@triton.jit
def _silu_bwd_kernel(
    dy_ptr,
    z_ptr,
    dz_ptr,
    dbias_ptr,
    L,
    stride_dy,
    silu_columns,
    F: tl.constexpr,
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
        offs = rows[:, None] * F + cols[None, :]
        dy = tl.load(dy_ptr + rows[:, None] * stride_dy + cols[None, :], mask=mask, other=0.0)
        z = tl.load(z_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        slope = tl.where((cols < silu_columns)[None, :], silu_derivative(z, FAST), 1.0)
        dz = dy.to(tl.float32) * slope
        dbias += dz
        tl.store(dz_ptr + offs, dz.to(dz_ptr.dtype.element_ty), mask=mask)
    tl.store(dbias_ptr + pid.to(tl.int64) * F + cols, tl.sum(dbias, 0), mask=cols < F)


def linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    silu_columns: int,
    keep: bool,
    *,
    scales: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    promote: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return y (L, F), and z (L, F) if `keep`, else an empty tensor.

    Args:
        x: (L, D), columns contiguous.
        weight: (F, D) contiguous, dtype of x.
        bias: (F,) contiguous.
        residual: (L, F), columns contiguous, dtype of y.
        silu_columns: y = silu(z) in so many first columns.
        keep: whether z is stored.
        scales: (L,) and (F,) float32, of the rows of x and of weight; for fp8 only.
        dtype: of y and z; None for that of x.
        promote: add fp8 products to the float32 sum tile by tile, where the tensor cores' own sum
            would be short (Hopper).
    """
    if x.dtype == torch.float32:
        return _linear_fwd_float32(x, weight, bias, residual, silu_columns, keep)
    (L, D), F = x.shape, weight.shape[0]
    y = x.new_empty(L, F, dtype=dtype)
    kept = x.new_empty(L if keep else 0, F, dtype=dtype)
    if L == 0:
        return y, kept
    tma = all(_fits_tma(tensor) for tensor in (x, weight, residual, y, kept) if tensor is not None)
    block_l, block_f, block_d, warps, stages = _tile(L, F, residual is not None, tma, promote)
    block_d *= 2 // x.element_size()
    half = block_f // 2

    def source(tensor: Tensor | None, columns: int, rows: int = block_l) -> object:
        if tensor is None or not tma or tensor.numel() == 0:
            return tensor
        return TensorDescriptor(tensor, [*tensor.shape], [*tensor.stride()], [rows, columns])

    x_scale, weight_scale = (None, None) if scales is None else scales
    tiles = cdiv(L, block_l) * cdiv(F, block_f)
    _linear_fwd_kernel[(num_programs(x.device, tiles, 1),)](
        source(x, block_d),
        source(weight, block_d, block_f),
        bias,
        source(residual, half),
        x_scale,
        weight_scale,
        source(y, half),
        source(kept, half) if keep else None,
        L,
        F,
        D,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        silu_columns,
        BLOCK_L=block_l,
        BLOCK_F=block_f,
        BLOCK_D=block_d,
        GROUP=GROUP,
        HAS_SCALE=scales is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        SILU=silu_columns > 0,
        KEEP=keep,
        FAST=is_fast(y.dtype),
        TMA=tma,
        FLATTEN=tma,
        IMPRECISE=block_d if promote else None,
        num_warps=warps,
        num_stages=stages,
    )
    return y, kept


def _linear_fwd_float32(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    silu_columns: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Return y and z from torch's product, with the epilogue apart.

    float32 multiplies on the ordinary units, where the epilogue is a few percent of the time and
    torch's product is far ahead of ours (50 against 7 TFLOP/s on one H200).
    """
    z = functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    y = silu_first(z, silu_columns)
    if residual is not None:
        y = y + residual
    return y, z if keep else z.new_empty(0, z.shape[1])


def silu_bwd(dy: Tensor, z: Tensor, silu_columns: int) -> tuple[Tensor, Tensor]:
    """Return dz (L, F), dy * silu'(z) in the first columns, and its sum (F,) in float32."""
    L, F = z.shape
    dz = torch.empty_like(z)
    block_f = min(512, next_power_of_2(F))
    rows = 4096 // block_f
    tiles_f = cdiv(F, block_f)
    blocks = cdiv(L, rows)
    programs = min(blocks, cdiv(num_programs(z.device, blocks * tiles_f, 4), tiles_f))
    dbias = z.new_empty(programs, F, dtype=torch.float32)
    if L > 0:
        _silu_bwd_kernel[(programs, tiles_f)](
            dy,
            z,
            dz,
            dbias,
            L,
            dy.stride(0),
            silu_columns,
            F=F,
            ROWS=rows,
            BLOCK_F=block_f,
            FAST=is_fast(z.dtype),
            num_warps=4,
        )
    return dz, dbias.sum(0)


def _tile(
    L: int, F: int, has_residual: bool, tma: bool, promote: bool
) -> tuple[int, int, int, int, int]:
    """Return (rows, columns, depth, warps, stages) of a tile.

    Of up to FEW_ROWS rows the tiles are small, so that every processor has one: 144 rows of 512
    take 8 us for 2,048 columns, where large tiles take 15, and 6 in place of 8 us for 512 (H200).

    128 x 256 x 64 was fastest on one H100 at D from 512 to 2048; a residual tile takes the room of
    one stage. Addresses without TMA take registers: a small tile; so does a second sum.
    """
    if not tma:
        return 64, 128, 32, 8, 2
    if L <= FEW_ROWS and not promote:
        return (64, 64, 64, 4, 4) if F > 1024 else (64, 32, 128, 4, 4)
    if F <= 128 or promote:
        return 128, 128, 64, 8, 3
    return 128, 256, 64, 8, 3 if has_residual else 4


def _fits_tma(tensor: Tensor) -> bool:
    """Whether a tensor can be described to the TMA unit."""
    return (
        tensor.data_ptr() % 16 == 0
        and tensor.stride(1) == 1
        and tensor.stride(0) * tensor.element_size() % 16 == 0
        and (not tensor.is_cuda or torch.cuda.get_device_capability(tensor.device) >= (9, 0))
    )
