"""Layer norm, one read and one write of each row.

Forward:  xh = (x - mean) * rstd,  y = xh * w + b
Backward: g = dy * w,  dx = rstd * (g - mean(g) - xh * mean(g * xh)) [+ dskip]
          dw = sum(dy * xh),  db = sum(dy)  [, sum(dskip)]

L rows, D columns. Sums over rows: each program keeps one partial row, added up by torch in a fixed
order, so that gradients are the same in every run on one device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.fp8 import quantize_tile
from kernels._triton.launch import launch
from kernels._triton.rows import backward_tile, forward_tile, num_programs
from kernels._triton.sizes import cdiv

STAGES = 3
"""Of the loop over rows in the backward pass: rows on their way and at work. On one H100 0.165,
0.308 and 0.582 ms at D = 512, 1024 and 2048; with 1 stage 0.186, 0.321 and 0.693."""


@triton.jit(do_not_specialize=["L"])
def _layer_norm_fwd_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    q_ptr,
    scale_ptr,
    mean_ptr,
    rstd_ptr,
    L,
    stride_x,
    eps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    QUANTIZE: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    mask = (rows < L)[:, None] & (cols < D)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_x + cols[None, :], mask=mask, other=0.0)
    x = x.to(tl.float32)
    mean = tl.sum(x, 1) / D
    centred = tl.where(mask, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)
    y = centred * rstd[:, None]
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    offs = rows[:, None] * D + cols[None, :]
    if KEEP:
        tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)
    if QUANTIZE:
        q, scale = quantize_tile(y)
        tl.store(q_ptr + offs, q, mask=mask)
        tl.store(scale_ptr + rows, scale, mask=rows < L)
    tl.store(mean_ptr + rows, mean, mask=rows < L)
    tl.store(rstd_ptr + rows, rstd, mask=rows < L)


@triton.jit(do_not_specialize=["L"])
def _layer_norm_bwd_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dskip_ptr,
    dx_ptr,
    dweight_ptr,
    dbias_ptr,
    dskip_sum_ptr,
    L,
    stride_dy,
    stride_x,
    stride_dskip,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    pid = tl.program_id(0)
    cols = tl.arange(0, BLOCK_D)
    weight = tl.full((BLOCK_D,), 1.0, tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, BLOCK_D), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK_D), tl.float32)
    dskip_sum = tl.zeros((ROWS, BLOCK_D), tl.float32)
    # Staged: the next rows are on their way while these are worked on.
    for block in tl.range(pid, tl.cdiv(L, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = block * ROWS + tl.arange(0, ROWS).to(tl.int64)
        mask = (rows < L)[:, None] & (cols < D)[None, :]
        dy = tl.load(dy_ptr + rows[:, None] * stride_dy + cols[None, :], mask=mask, other=0.0)
        x = tl.load(x_ptr + rows[:, None] * stride_x + cols[None, :], mask=mask, other=0.0)
        mean = tl.load(mean_ptr + rows, mask=rows < L, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < L, other=0.0)
        dy = dy.to(tl.float32)
        xh = tl.where(mask, (x.to(tl.float32) - mean[:, None]) * rstd[:, None], 0.0)
        if HAS_WEIGHT:
            dweight += dy * xh
        if HAS_BIAS:
            dbias += dy
        g = dy * weight[None, :]
        mean_g = tl.sum(g, 1) / D
        mean_gx = tl.sum(g * xh, 1) / D
        dx = rstd[:, None] * (g - mean_g[:, None] - xh * mean_gx[:, None])
        if dskip_ptr is not None:
            offs_dskip = rows[:, None] * stride_dskip + cols[None, :]
            dskip = tl.load(dskip_ptr + offs_dskip, mask=mask, other=0.0).to(tl.float32)
            dx += dskip
            if dskip_sum_ptr is not None:
                dskip_sum += dskip
        offs = rows[:, None] * D + cols[None, :]
        tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    offs = pid.to(tl.int64) * D + cols
    if HAS_WEIGHT:
        tl.store(dweight_ptr + offs, tl.sum(dweight, 0), mask=cols < D)
    if HAS_BIAS:
        tl.store(dbias_ptr + offs, tl.sum(dbias, 0), mask=cols < D)
    if dskip_sum_ptr is not None:
        tl.store(dskip_sum_ptr + offs, tl.sum(dskip_sum, 0), mask=cols < D)


def layer_norm_fwd(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y (L, D), mean (L,) and rstd (L,) float32. x may have any row stride."""
    y = x.new_empty(x.shape)
    return y, *_forward(x, weight, bias, y, None, None, eps)


def layer_norm_fp8_fwd(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return q and scale of y, y (empty unless `keep`), mean and rstd."""
    L, D = x.shape
    q = x.new_empty(L, D, dtype=torch.float8_e4m3fn)
    scale = x.new_empty(L, dtype=torch.float32)
    y = x.new_empty(L if keep else 0, D)
    return q, scale, y, *_forward(x, weight, bias, y if keep else None, q, scale, eps)


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    q: Tensor | None,
    scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Fill y, or q and scale, or all of them; return mean and rstd."""
    L, D = x.shape
    mean, rstd = x.new_empty(L, dtype=torch.float32), x.new_empty(L, dtype=torch.float32)
    if L == 0:
        return mean, rstd
    rows, columns, warps = forward_tile(D)
    launch(
        _layer_norm_fwd_kernel,
        (cdiv(L, rows), 1, 1),
        [
            x,
            weight,
            bias,
            y,
            q,
            scale,
            mean,
            rstd,
            L,
            x.stride(0),
            eps,
        ],
        {
            "D": D,
            "ROWS": rows,
            "BLOCK_D": columns,
            "HAS_WEIGHT": weight is not None,
            "HAS_BIAS": bias is not None,
            "KEEP": y is not None,
            "QUANTIZE": q is not None,
        },
        num_warps=warps,
    )
    return mean, rstd


def layer_norm_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    has_bias: bool,
    mean: Tensor,
    rstd: Tensor,
    dskip: Tensor | None = None,
    *,
    sum_dskip: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dx, and dweight, dbias and the sum of dskip over rows in float32.

    Zero where there is none, or the sum is not wanted.

    Args:
        dy: (L, D), any row stride.
        x: as in the forward pass, like the rest.
        weight: likewise.
        has_bias: whether there is one.
        mean: as the forward pass returned it.
        rstd: likewise.
        dskip: (L, D), any row stride: what x gets by a way around the norm, added to dx.
        sum_dskip: whether its sum is wanted: the gradient of a bias on that way, which would be a
            pass of its own.
    """
    L, D = x.shape
    dx = x.new_empty(L, D)
    rows, columns, warps, per_processor = backward_tile(D)
    programs = num_programs(x.device, cdiv(L, rows), per_processor)
    wanted = (weight is not None, has_bias, sum_dskip)
    dweight, dbias, dskip_sum = (
        x.new_empty(programs if w else 0, D, dtype=torch.float32) for w in wanted
    )
    if L > 0:
        launch(
            _layer_norm_bwd_kernel,
            (programs, 1, 1),
            [
                dy,
                x,
                weight,
                mean,
                rstd,
                dskip,
                dx,
                dweight,
                dbias,
                dskip_sum if sum_dskip else None,
                L,
                dy.stride(0),
                x.stride(0),
                0 if dskip is None else dskip.stride(0),
            ],
            {
                "D": D,
                "ROWS": rows,
                "BLOCK_D": columns,
                "STAGES": STAGES,
                "HAS_WEIGHT": wanted[0],
                "HAS_BIAS": wanted[1],
            },
            num_warps=warps,
        )
    return dx, dweight.sum(0), dbias.sum(0), dskip_sum.sum(0)
