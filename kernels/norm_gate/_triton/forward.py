"""Forward pass of the gated norm: the formula is in __init__.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.fp8 import quantize_tile
from kernels._triton.launch import launch
from kernels._triton.rows import forward_tile
from kernels._triton.sizes import cdiv
from kernels.norm_gate._triton.output import dropped, make_row_keys, store_out


@triton.jit(do_not_specialize=["L"])
def _norm_gate_fwd_kernel(
    x_ptr,
    u_ptr,
    weight_ptr,
    bias_ptr,
    seed_ptr,
    out_ptr,
    q_ptr,
    q_scale_ptr,
    mean_ptr,
    rstd_ptr,
    L,
    stride_x,
    stride_u,
    eps,
    threshold,
    scale,
    C: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CONCAT: tl.constexpr,
    DROPOUT: tl.constexpr,
    KEEP: tl.constexpr,
    QUANTIZE: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    cols = tl.arange(0, BLOCK_V)
    channels = group * V + cols
    mask = (rows < L)[:, None] & (cols < V)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_x + channels[None, :], mask=mask, other=0.0)
    u = tl.load(u_ptr + rows[:, None] * stride_u + channels[None, :], mask=mask, other=0.0)
    x = x.to(tl.float32)
    u = u.to(tl.float32)
    mean = tl.sum(x, 1) / V
    centred = tl.where(mask, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / V + eps)
    y = centred * rstd[:, None]
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + channels, mask=cols < V, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + channels, mask=cols < V, other=0.0).to(tl.float32)[None, :]
    y *= u

    per_group = rows * (C // V) + group
    tl.store(mean_ptr + per_group, mean, mask=rows < L)
    tl.store(rstd_ptr + per_group, rstd, mask=rows < L)
    keys = rows.to(tl.uint32)
    if DROPOUT:
        keys = make_row_keys(seed_ptr, rows)
    if KEEP:
        out = out_ptr + rows[:, None] * (3 * C if CONCAT else C) + channels[None, :]
        store_out(out, u, x, y, keys, channels, mask, threshold, scale, C, CONCAT, DROPOUT)
    if QUANTIZE:
        if DROPOUT:
            y = dropped(y, keys, channels, threshold, scale)
        q, q_scale = quantize_tile(y)
        tl.store(q_ptr + rows[:, None] * C + channels[None, :], q, mask=mask)
        tl.store(q_scale_ptr + rows, q_scale, mask=rows < L)


def norm_gate_fwd(
    x: Tensor,
    u: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    num_groups: int,
    eps: float,
    concat: bool,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return out (L, C or 3 C), mean and rstd (L, G) float32. x and u may have any row stride."""
    L, C = x.shape
    out = x.new_empty(L, 3 * C if concat else C)
    vectors = (weight, bias, seed)
    return out, *_forward(x, u, *vectors, out, None, None, num_groups, eps, concat, dropout)


def norm_gate_fp8_fwd(
    x: Tensor,
    u: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return q and scale of out, out (empty unless `keep`), mean and rstd (L, 1); of one group."""
    L, C = x.shape
    q = x.new_empty(L, C, dtype=torch.float8_e4m3fn)
    scale = x.new_empty(L, dtype=torch.float32)
    out = x.new_empty(L if keep else 0, C)
    targets = (out if keep else None, q, scale)
    mean, rstd = _forward(x, u, weight, bias, seed, *targets, 1, eps, False, dropout)
    return q, scale, out, mean, rstd


def _forward(
    x: Tensor,
    u: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    out: Tensor | None,
    q: Tensor | None,
    scale: Tensor | None,
    num_groups: int,
    eps: float,
    concat: bool,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Fill out, or q and scale, or all of them; return mean and rstd."""
    L, C = x.shape
    V = C // num_groups
    mean, rstd = (x.new_empty(L, num_groups, dtype=torch.float32) for _ in range(2))
    if L == 0:
        return mean, rstd
    rows, columns, warps = forward_tile(V)
    launch(
        _norm_gate_fwd_kernel,
        (cdiv(L, rows), num_groups, 1),
        [
            x,
            u,
            weight,
            bias,
            seed,
            out,
            q,
            scale,
            mean,
            rstd,
            L,
            x.stride(0),
            u.stride(0),
            eps,
            round(dropout * 2**24),
            1 / (1 - dropout),
        ],
        {
            "C": C,
            "V": V,
            "ROWS": rows,
            "BLOCK_V": columns,
            "HAS_WEIGHT": weight is not None,
            "HAS_BIAS": bias is not None,
            "CONCAT": concat,
            "DROPOUT": dropout > 0,
            "KEEP": out is not None,
            "QUANTIZE": q is not None,
        },
        num_warps=warps,
    )
    return mean, rstd
