"""Backward pass of the gated norm: the formulas are in __init__.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.fp8 import quantize_tile
from kernels._triton.launch import launch
from kernels._triton.rows import backward_tile, num_programs
from kernels._triton.silu import is_fast, silu, silu_derivative
from kernels._triton.sizes import cdiv
from kernels.norm_gate._triton.output import dropped, make_row_keys, store_out
from kernels.quantize import QuantizedRows

STAGES = 2
"""Of the loop over rows in the backward pass: rows on their way and at work. On one H100 0.261,
0.484 and 0.945 ms at C = 512, 1024 and 2048; with 1 stage 0.276, 0.492 and 0.966, with 3 (more
registers than two programs have) 0.268, 0.488 and 0.964. Forms that do more keep 1: with 2 they
need 170 registers, and one program a processor would fit."""


@triton.jit(do_not_specialize=["L"])
def _norm_gate_bwd_kernel(
    dout_ptr,
    x_ptr,
    u_ptr,
    weight_ptr,
    bias_ptr,
    seed_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    du_ptr,
    out_ptr,
    q_ptr,
    q_scale_ptr,
    dweight_ptr,
    dbias_ptr,
    du_sum_ptr,
    L,
    stride_dout,
    stride_x,
    stride_u,
    stride_du,
    threshold,
    scale,
    C: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CONCAT: tl.constexpr,
    DROPOUT: tl.constexpr,
    SILU: tl.constexpr,
    FAST: tl.constexpr,
):
    pid = tl.program_id(0)
    group = tl.program_id(1)
    cols = tl.arange(0, BLOCK_V)
    channels = group * V + cols
    weight = tl.full((BLOCK_V,), 1.0, tl.float32)
    bias = tl.zeros((BLOCK_V,), tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + channels, mask=cols < V, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channels, mask=cols < V, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, BLOCK_V), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK_V), tl.float32)
    du_sum = tl.zeros((ROWS, BLOCK_V), tl.float32)
    # Staged: the next rows are on their way while these are worked on.
    for block in tl.range(pid, tl.cdiv(L, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = block * ROWS + tl.arange(0, ROWS).to(tl.int64)
        mask = (rows < L)[:, None] & (cols < V)[None, :]
        offs_dout = rows[:, None] * stride_dout + channels[None, :]
        if CONCAT:
            dy = tl.load(dout_ptr + offs_dout + 2 * C, mask=mask, other=0.0).to(tl.float32)
            du = tl.load(dout_ptr + offs_dout, mask=mask, other=0.0).to(tl.float32)
            dx = tl.load(dout_ptr + offs_dout + C, mask=mask, other=0.0).to(tl.float32)
        else:
            dy = tl.load(dout_ptr + offs_dout, mask=mask, other=0.0).to(tl.float32)
        keys = rows.to(tl.uint32)
        if DROPOUT:
            keys = make_row_keys(seed_ptr, rows)
            if CONCAT:
                du = dropped(du, keys, channels, threshold, scale)
                dx = dropped(dx, keys, channels + C, threshold, scale)
                dy = dropped(dy, keys, channels + 2 * C, threshold, scale)
            else:
                dy = dropped(dy, keys, channels, threshold, scale)
        x = tl.load(x_ptr + rows[:, None] * stride_x + channels[None, :], mask=mask, other=0.0)
        u = tl.load(u_ptr + rows[:, None] * stride_u + channels[None, :], mask=mask, other=0.0)
        x = x.to(tl.float32)
        if SILU:
            z = u.to(tl.float32)
            u = silu(z, FAST).to(u.dtype)  # The bits that the forward pass read.
        u = u.to(tl.float32)
        per_group = rows * (C // V) + group
        mean = tl.load(mean_ptr + per_group, mask=rows < L, other=0.0)
        rstd = tl.load(rstd_ptr + per_group, mask=rows < L, other=0.0)
        xh = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
        n = xh * weight[None, :] + bias[None, :]

        offs = rows[:, None] * C + channels[None, :]
        gate_grad = dy * n
        if CONCAT:
            gate_grad += du
        if SILU:
            gate_grad *= silu_derivative(z, FAST)
        if du_sum_ptr is not None:
            du_sum += gate_grad
        offs_du = rows[:, None] * stride_du + channels[None, :]
        tl.store(du_ptr + offs_du, gate_grad.to(du_ptr.dtype.element_ty), mask=mask)

        dn = dy * u
        if HAS_WEIGHT:
            dweight += dn * xh
        if HAS_BIAS:
            dbias += dn
        g = dn * weight[None, :]
        mean_g = tl.sum(g, 1) / V
        mean_gx = tl.sum(g * xh, 1) / V
        x_grad = rstd[:, None] * (g - mean_g[:, None] - xh * mean_gx[:, None])
        if CONCAT:
            x_grad += dx
        tl.store(dx_ptr + offs, x_grad.to(dx_ptr.dtype.element_ty), mask=mask)
        if out_ptr is not None:
            y = n * u
            out = out_ptr + rows[:, None] * (3 * C if CONCAT else C) + channels[None, :]
            store_out(out, u, x, y, keys, channels, mask, threshold, scale, C, CONCAT, DROPOUT)
        if q_ptr is not None:
            y = n * u
            if DROPOUT:
                y = dropped(y, keys, channels, threshold, scale)
            q, q_scale = quantize_tile(y)
            tl.store(q_ptr + offs, q, mask=mask)
            tl.store(q_scale_ptr + rows, q_scale, mask=rows < L)
    offs_sum = pid.to(tl.int64) * C + channels
    if HAS_WEIGHT:
        tl.store(dweight_ptr + offs_sum, tl.sum(dweight, 0), mask=cols < V)
    if HAS_BIAS:
        tl.store(dbias_ptr + offs_sum, tl.sum(dbias, 0), mask=cols < V)
    if du_sum_ptr is not None:
        tl.store(du_sum_ptr + offs_sum, tl.sum(du_sum, 0), mask=cols < V)


def norm_gate_bwd(
    dout: Tensor,
    x: Tensor,
    u: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    concat: bool,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dx, du (L, C), and dweight and dbias in float32 (zero where there is none).

    Args:
        dout: (L, C) or (L, 3 C), any row stride.
        x: as in the forward pass, like the rest.
        u: likewise.
        weight: likewise.
        bias: likewise.
        seed: likewise.
        mean: as the forward pass returned it.
        rstd: likewise.
        num_groups: as in the forward pass, like the rest.
        concat: likewise.
        dropout: likewise.
    """
    du = u.new_empty(u.shape)
    vectors = (weight, bias, seed, mean, rstd)
    dx, *sums = _backward(dout, x, u, *vectors, num_groups, concat, dropout, du)
    return dx, du, sums[0], sums[1]


def norm_gate_silu_bwd(
    dout: Tensor,
    x: Tensor,
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    concat: bool,
    dropout: float,
    dz: Tensor,
    has_dz_sum: bool,
    out: Tensor | None = None,
    rows: QuantizedRows | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what norm_gate_bwd does for u = silu(z), but the sum of dz over rows in place of du.

    The sum is float32, zero unless `has_dz_sum`.

    Args:
        dout: as in norm_gate_bwd, like the others.
        x: likewise.
        z: (L, C), any row stride; silu(z) rounded to its dtype was u.
        weight: likewise.
        bias: likewise.
        seed: likewise.
        mean: likewise.
        rstd: likewise.
        num_groups: likewise.
        concat: likewise.
        dropout: likewise.
        dz: (L, C), any row stride, is given the gradient of z; may be z itself.
        has_dz_sum: whether the sum is wanted.
        out: of the shape of dout, contiguous: is given what the forward pass returned, to the bit.
        rows: of (L, C), contiguous: is given what norm_gate_fp8 returned; for one group, no concat.
    """
    vectors = (weight, bias, seed, mean, rstd)
    options = (num_groups, concat, dropout)
    return _backward(dout, x, z, *vectors, *options, dz, True, has_dz_sum, out, rows)


def _backward(
    dout: Tensor,
    x: Tensor,
    u: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    concat: bool,
    dropout: float,
    du: Tensor,
    has_silu: bool = False,
    has_du_sum: bool = False,
    out: Tensor | None = None,
    quantized: QuantizedRows | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fill du, out and quantized; return dx, dweight, dbias and the sum of du over rows."""
    L, C = x.shape
    V = C // num_groups
    dx = x.new_empty(L, C)
    rows, columns, warps, per_processor = backward_tile(V)
    if has_du_sum and weight is not None:
        rows = max(1, rows // 2)  # Three sums: with whole tiles one program a processor would fit.
    plain = not (has_silu or has_du_sum or concat or dropout > 0 or out is not None)
    stages = STAGES if plain and quantized is None else 1
    blocks = cdiv(L, rows)
    programs = min(
        blocks, cdiv(num_programs(x.device, blocks * num_groups, per_processor), num_groups)
    )
    wanted = (weight is not None, bias is not None, has_du_sum)
    dweight, dbias, du_sum = (
        x.new_empty(programs if w else 0, C, dtype=torch.float32) for w in wanted
    )
    if L > 0:
        launch(
            _norm_gate_bwd_kernel,
            (programs, num_groups, 1),
            [
                dout,
                x,
                u,
                weight,
                bias,
                seed,
                mean,
                rstd,
                dx,
                du,
                out,
                *((None, None) if quantized is None else quantized),
                dweight,
                dbias,
                du_sum if has_du_sum else None,
                L,
                dout.stride(0),
                x.stride(0),
                u.stride(0),
                du.stride(0),
                round(dropout * 2**24),
                1 / (1 - dropout),
            ],
            {
                "C": C,
                "V": V,
                "ROWS": rows,
                "BLOCK_V": columns,
                "STAGES": stages,
                "HAS_WEIGHT": wanted[0],
                "HAS_BIAS": wanted[1],
                "CONCAT": concat,
                "DROPOUT": dropout > 0,
                "SILU": has_silu,
                "FAST": is_fast(x.dtype),
            },
            num_warps=warps,
        )
    return dx, dweight.sum(0), dbias.sum(0), du_sum.sum(0)
