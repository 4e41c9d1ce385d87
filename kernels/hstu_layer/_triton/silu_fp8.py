"""SiLU's gradient with the result in fp8: one read of four gradients and of Z.

dz = back(dy) * silu'(z), by rows in fp8 with one scale over all columns, and in 16 bits where it is
asked for; the gradients of queries and keys may have to be turned back, as in silu.py. The
attention's gradients of V, Q and K each have a buffer; that of U, which the gated norm's backward
kernel has multiplied already, stands in its columns of dz.

A row of all parts is held at once, since its scale is that of the largest of them. Sums over rows
as in silu.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.fp8 import row_scale, to_e4m3
from kernels._triton.rows import num_programs
from kernels._triton.silu import is_fast, silu_derivative
from kernels._triton.sizes import cdiv, next_power_of_2
from kernels._triton.turn import turn
from kernels.quantize import QuantizedRows
from kernels.rotary.columns import Turn, turn_arguments


@triton.jit
def _load(
    dy_ptr, z_ptr, rows, L, stride_dy, stride_z, WIDTH, BLOCK, SILU: tl.constexpr, FAST,
    cos_ptr, sin_ptr, H, K, PER_HEAD, ROWS, factor=1.0,
):  # fmt: skip
    """Return dz of a part (ROWS, BLOCK) in float32, zero outside."""
    cols = tl.arange(0, BLOCK)
    mask = (rows < L)[:, None] & (cols < WIDTH)[None, :]
    dz = tl.load(dy_ptr + rows[:, None] * stride_dy + cols[None, :], mask=mask, other=0.0)
    dz = dz.to(tl.float32) * factor
    if cos_ptr is not None:
        dz = turn(dz, rows, 0, L, cos_ptr, sin_ptr, 0, H, K, PER_HEAD, True, ROWS, BLOCK)
    if SILU:
        z = tl.load(z_ptr + rows[:, None] * stride_z + cols[None, :], mask=mask, other=0.0)
        dz *= silu_derivative(z.to(tl.float32), FAST)
    return dz


@triton.jit
def _larger(largest, x):
    """Return the larger magnitude of each place; infinity for NaN, which a maximum passes over."""
    return tl.maximum(largest, tl.where(x == x, tl.abs(x), float("inf")))


@triton.jit
def _store(target, dz, inverse, rows, L, stride, WIDTH, BLOCK: tl.constexpr):
    """Write a part times `inverse`, or as it is where that is None, in the dtype of the target."""
    cols = tl.arange(0, BLOCK)
    mask = (rows < L)[:, None] & (cols < WIDTH)[None, :]
    if inverse is not None:
        dz = to_e4m3(tl.where((inverse > 0)[:, None], dz * inverse[:, None], 0.0))
    offs = rows[:, None] * stride + cols[None, :]
    tl.store(target + offs, dz.to(target.dtype.element_ty), mask=mask)


@triton.jit
def _store_sum(dbias_ptr, dbias, pid, stride, WIDTH, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    offs = pid.to(tl.int64) * stride + cols
    tl.store(dbias_ptr + offs, tl.sum(dbias, 0), mask=cols < WIDTH)


@triton.jit(do_not_specialize=["L"])
def _silu_bwd_fp8_kernel(
    du_ptr,
    dv_ptr,
    dq_ptr,
    dk_ptr,
    z_ptr,
    dz_ptr,
    values_ptr,
    scale_ptr,
    dbias_ptr,
    L,
    stride_du,
    stride_dv,
    stride_dq,
    stride_dk,
    stride_z,
    stride_dz,
    F,
    stride_dbias,
    q_factor,
    q_cos_ptr,
    q_sin_ptr,
    q_first,
    k_cos_ptr,
    k_sin_ptr,
    k_first,
    H: tl.constexpr,
    K_DIM: tl.constexpr,
    PER_HEAD: tl.constexpr,
    HV: tl.constexpr,
    HK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SILU: tl.constexpr,
    KEEP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FAST: tl.constexpr,
):
    pid = tl.program_id(0)
    # A part that this projection does not have is None; the others are neighbours.
    V: tl.constexpr = 0 if du_ptr is None else HV
    Q: tl.constexpr = V if dv_ptr is None else V + HV
    K: tl.constexpr = Q if dq_ptr is None else Q + HK
    v_sum = tl.zeros((ROWS, BLOCK_V), tl.float32)
    q_sum = tl.zeros((ROWS, BLOCK_K), tl.float32)
    k_sum = tl.zeros((ROWS, BLOCK_K), tl.float32)
    for block in range(pid, tl.cdiv(L, ROWS), tl.num_programs(0)):
        rows = block * ROWS + tl.arange(0, ROWS).to(tl.int64)
        largest = tl.zeros((ROWS, BLOCK_V), tl.float32)
        if du_ptr is not None:
            du = _load(
                du_ptr, z_ptr, rows, L, stride_du, stride_z, HV, BLOCK_V, False, FAST,
                None, None, H, K_DIM, PER_HEAD, ROWS,
            )  # fmt: skip
            largest = _larger(largest, du)
        if dv_ptr is not None:
            dv = _load(
                dv_ptr, z_ptr + V, rows, L, stride_dv, stride_z, HV, BLOCK_V, SILU, FAST,
                None, None, H, K_DIM, PER_HEAD, ROWS,
            )  # fmt: skip
            largest = _larger(largest, dv)
        # One reduction where all parts are as wide: each waits for every warp.
        amax = tl.zeros((ROWS,), tl.float32)
        if BLOCK_V != BLOCK_K:
            amax = tl.max(largest, 1)
            largest = tl.zeros((ROWS, BLOCK_K), tl.float32)
        if dq_ptr is not None:
            dq = _load(
                dq_ptr, z_ptr + Q, rows, L, stride_dq, stride_z, HK, BLOCK_K, SILU, FAST,
                q_cos_ptr, q_sin_ptr, H, K_DIM, PER_HEAD, ROWS, q_factor,
            )  # fmt: skip
            largest = _larger(largest, dq)
        if dk_ptr is not None:
            dk = _load(
                dk_ptr, z_ptr + K, rows, L, stride_dk, stride_z, HK, BLOCK_K, SILU, FAST,
                k_cos_ptr, k_sin_ptr, H, K_DIM, PER_HEAD, ROWS,
            )  # fmt: skip
            largest = _larger(largest, dk)
        amax = tl.maximum(amax, tl.max(largest, 1))
        scale, inverse = row_scale(amax)
        tl.store(scale_ptr + rows, scale, mask=rows < L)
        if du_ptr is not None:
            _store(values_ptr, du, inverse, rows, L, F, HV, BLOCK_V)
        if dv_ptr is not None:
            _store(values_ptr + V, dv, inverse, rows, L, F, HV, BLOCK_V)
            if KEEP:
                _store(dz_ptr + V, dv, None, rows, L, stride_dz, HV, BLOCK_V)
            if HAS_BIAS:
                v_sum += dv
        if dq_ptr is not None:
            _store(values_ptr + Q, dq, inverse, rows, L, F, HK, BLOCK_K)
            if KEEP:
                _store(dz_ptr + Q, dq, None, rows, L, stride_dz, HK, BLOCK_K)
            if HAS_BIAS:
                q_sum += dq
        if dk_ptr is not None:
            _store(values_ptr + K, dk, inverse, rows, L, F, HK, BLOCK_K)
            if KEEP:
                _store(dz_ptr + K, dk, None, rows, L, stride_dz, HK, BLOCK_K)
            if HAS_BIAS:
                k_sum += dk
    if HAS_BIAS:
        # The sums are of all columns but U's.
        if dv_ptr is not None:
            _store_sum(dbias_ptr, v_sum, pid, stride_dbias, HV, BLOCK_V)
        if dq_ptr is not None:
            _store_sum(dbias_ptr + (Q - V), q_sum, pid, stride_dbias, HK, BLOCK_K)
        if dk_ptr is not None:
            _store_sum(dbias_ptr + (K - V), k_sum, pid, stride_dbias, HK, BLOCK_K)


def silu_bwd_fp8(
    parts: dict[str, Tensor],
    z: Tensor,
    dz: Tensor,
    *,
    has_silu: bool,
    keep: bool,
    has_bias: bool,
    turns: dict[str, Turn] | None = None,
    q_factor: float = 1.0,
) -> tuple[QuantizedRows, Tensor]:
    """Return dz in fp8, and as silu_bwd the sums over rows of all columns but U's.

    Args:
        parts: gradient of some of v, q and k, by letter, each (L, any), columns contiguous.
        z: (L, F), columns contiguous; F columns of u, if any, and of the parts.
        dz: columns contiguous; U's gradient stands in the first columns, which may be all it has
            unless `keep`. May be z itself.
        has_silu: whether these are gradients of silu(z), or of z.
        keep: whether to fill the other columns of dz.
        has_bias: whether the sums are wanted.
        turns: how q and k were turned, by letter, in columns of their own.
        q_factor: what the gradient of q is multiplied by first.
    """
    L, F = z.shape
    widths = {name: part.shape[1] for name, part in parts.items()}
    rest = sum(widths.values())
    HV = widths["v"] if "v" in widths else F - rest
    HK = widths["q"] if "q" in widths else widths["k"]
    values = z.new_empty(L, F, dtype=torch.float8_e4m3fn)
    scale = z.new_empty(L, dtype=torch.float32)
    block_v, block_k = next_power_of_2(HV), next_power_of_2(HK)
    padded = sum(block_v if name == "v" else block_k for name in parts)
    padded += block_v if rest < F else 0
    rows, warps, per_processor = _tile(padded, has_bias)
    programs = num_programs(z.device, cdiv(L, rows), per_processor)
    dbias = z.new_empty(programs if has_bias else 0, rest, dtype=torch.float32)
    angles, heads = turn_arguments(*((turns or {}).get(name) for name in "qk"))
    if L > 0:
        given = [dz if rest < F else None, *(parts.get(name) for name in "vqk")]
        _silu_bwd_fp8_kernel[(programs,)](
            *given,
            z,
            dz,
            values,
            scale,
            dbias,
            L,
            *(0 if part is None else part.stride(0) for part in given),
            z.stride(0),
            dz.stride(0),
            F,
            dbias.stride(0),
            q_factor,
            *angles,
            H=heads["H"],
            K_DIM=heads["K"],
            PER_HEAD=heads["PER_HEAD"],
            HV=HV,
            HK=HK,
            ROWS=rows,
            BLOCK_V=block_v,
            BLOCK_K=block_k,
            SILU=has_silu,
            KEEP=keep,
            HAS_BIAS=has_bias,
            FAST=is_fast(z.dtype),
            num_warps=warps,
        )
    return QuantizedRows(values, scale), dbias.sum(0)


def _tile(columns: int, has_bias: bool) -> tuple[int, int, int]:
    """Return (rows, warps, programs a processor) for so many padded columns.

    16 elements a thread up to 8192 columns, in 40 registers, 80 with sums; as many programs as
    these let run at once: on one H100 0.81 ms at D = 1024 for 131072 tokens, 3 a processor 0.94.
    """
    warps = min(16, max(4, columns // 512))
    rows = 2 ** ((2048 // columns).bit_length() - 1) if columns <= 2048 else 1
    registers = (80 if has_bias else 40) * max(1, columns // 8192)
    return rows, warps, max(1, 65536 // (32 * warps * registers))
