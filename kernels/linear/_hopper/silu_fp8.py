"""Backward pass of SiLU with dz in fp8 by rows, and its bytes transposed, in one pass.

The two products of the backward pass read dz along different axes, and Hopper multiplies 8-bit
tiles with the sum along rows only. A program holds the bytes of 32 tokens in shared memory as it
makes them, row by row, and writes them again with tokens along the rows, 32 bytes at a time: the
least piece that memory moves (with pieces of 16 the pass took twice as long on one H100). A pass of
its own would read and write dz again, 2 bytes an element; here that is 1. Rows of up to 2048 only:
of longer ones two programs do not fit into a processor, and the two passes are as fast.

The formulas are those of _triton/silu_fp8.py and of kernels/_triton/fp8.py, and so are the bits.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels._triton.rows import num_programs
from kernels.quantize.reference import padded_tokens

TOKENS = 32
"""Tokens of a group: bytes of a piece of memory."""
WARPS = 8


@gluon.jit
def _opaque(x):
    """Return int32 x, unknown to the compiler, which keeps addresses in registers otherwise."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _load(dy_ptr, z_ptr, rows, cols, L, stride_dy, F: gl.constexpr):
    rows64 = rows.to(gl.int64)[:, None]
    mask = (rows < L)[:, None] & (cols < F)[None, :]
    dy = gl.load(dy_ptr + rows64 * stride_dy + cols[None, :], mask=mask, other=0.0)
    z = gl.load(z_ptr + rows64 * F + cols[None, :], mask=mask, other=0.0)
    return dy, z


@gluon.jit
def _row_scale(amax):
    """Return row_scale(amax) of kernels/_triton/fp8.py: Gluon calls no Triton function."""
    bits = amax.to(gl.int32, bitcast=True)
    # Bits of 448 = 1.75 * 2^8 and of 2^-60.
    exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(gl.int32)
    exponent = gl.maximum(exponent, 127 - 60)
    scale = (exponent << 23).to(gl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(gl.float32, bitcast=True)
    finite = amax < float("inf")
    return gl.where(finite, scale, float("nan")), gl.where(finite, inverse, 0.0)


@gluon.jit
def _silu_bwd_transposed_kernel(
    dy_ptr,
    z_ptr,
    q_ptr,
    transposed_ptr,
    scale_ptr,
    dbias_ptr,
    L,
    groups,
    stride_dy,
    silu_columns,
    F: gl.constexpr,
    BLOCK_F: gl.constexpr,
    TOKENS: gl.constexpr,
    ROWS: gl.constexpr,
    COLS: gl.constexpr,
    WARPS: gl.constexpr,
):
    ALONG: gl.constexpr = min(WARPS, max(1, BLOCK_F // 256))
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [WARPS // ALONG, ALONG], [1, 0])
    # Of the tile with tokens along the rows: 16 bytes a thread.
    OUT: gl.constexpr = gl.BlockedLayout([16, 4], [2, 16], [1, WARPS], [0, 1])
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    CHUNKS: gl.constexpr = TOKENS // ROWS
    chunks = gl.allocate_shared_memory(gl.uint8, [CHUNKS, ROWS, BLOCK_F], SHARED)
    tile = chunks._reinterpret(gl.uint8, [TOKENS, BLOCK_F], SHARED)
    cols = gl.arange(0, BLOCK_F, gl.SliceLayout(0, LAYOUT))
    local = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    tokens = gl.arange(0, TOKENS, gl.SliceLayout(1, OUT))
    columns = gl.arange(0, COLS, gl.SliceLayout(0, OUT))
    dbias = gl.zeros([ROWS, BLOCK_F], gl.float32, LAYOUT)
    first = gl.program_id(0)
    programs = gl.num_programs(0)
    dy, z = _load(dy_ptr, z_ptr, first * TOKENS + local, cols, L, stride_dy, F)
    for group in range(first, groups, programs):
        for chunk in range(CHUNKS):
            # The next rows are on their way while these are worked on.
            ahead = group * TOKENS + (chunk + 1) * ROWS
            if chunk == CHUNKS - 1:
                ahead = (group + programs) * TOKENS
            next_dy, next_z = _load(dy_ptr, z_ptr, ahead + local, cols, L, stride_dy, F)
            dz = dy.to(gl.float32)
            x = z.to(gl.float32)
            tanh = gl.inline_asm_elementwise(
                "tanh.approx.f32 $0, $1;",
                "=f,f",
                [x * 0.5],
                dtype=gl.float32,
                is_pure=True,
                pack=1,
            )
            sigmoid = tanh * 0.5 + 0.5
            slope = sigmoid + x * sigmoid * (1.0 - sigmoid)
            dz *= gl.where((cols < silu_columns)[None, :], slope, 1.0)
            dbias += dz
            # A maximum may pass over NaN.
            scale, inverse = _row_scale(gl.max(gl.where(dz == dz, gl.abs(dz), float("inf")), 1))
            scaled = gl.where((inverse > 0)[:, None], dz * inverse[:, None], 0.0)
            q = scaled.to(gl.float8e4nv)
            rows = group * TOKENS + chunk * ROWS + local
            offs = rows.to(gl.int64)[:, None] * F + cols[None, :]
            gl.store(q_ptr + offs, q, mask=(rows < L)[:, None] & (cols < F)[None, :])
            gl.store(scale_ptr + rows, scale, mask=rows < L)
            chunks.index(chunk).store(q.to(gl.uint8, bitcast=True))
            dy, z = next_dy, next_z
        gl.thread_barrier()
        for part in gl.static_range(BLOCK_F // COLS):
            if part * COLS < F:
                out = _opaque(part * COLS + columns)
                value = tile.slice(part * COLS, COLS, 1).load(OUT)
                offs = out.to(gl.int64)[None, :] * (groups * TOKENS)
                offs += (group * TOKENS + tokens)[:, None]
                gl.store(transposed_ptr + offs, value, mask=(out < F)[None, :])
        gl.thread_barrier()
    gl.store(dbias_ptr + first * F + cols, gl.sum(dbias, 0), mask=cols < F)


def silu_bwd_fp8_transposed(
    dy: Tensor, z: Tensor, silu_columns: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q (L, F), scale (L,), q transposed (F, padded L) and dbias (F,) float32.

    Args:
        dy: (L, F) of 16 bits, columns contiguous, F a multiple of 16 up to 2048.
        z: (L, F) contiguous, dtype of dy.
        silu_columns: dz = dy * silu'(z) in so many first columns, dy in the others.
    """
    L, F = dy.shape
    padded = padded_tokens(L)
    q = dy.new_empty(L, F, dtype=torch.float8_e4m3fn)
    transposed = dy.new_empty(F, padded, dtype=torch.float8_e4m3fn)
    scale = dy.new_empty(L, dtype=torch.float32)
    columns = max(128, triton.next_power_of_2(F))
    groups = padded // TOKENS
    programs = num_programs(dy.device, groups, 2)
    dbias = dy.new_empty(programs, F, dtype=torch.float32)
    if L > 0:
        _silu_bwd_transposed_kernel[(programs,)](
            dy,
            z,
            q,
            transposed.view(torch.uint8),
            scale,
            dbias,
            L,
            groups,
            dy.stride(0),
            silu_columns,
            F=F,
            BLOCK_F=columns,
            TOKENS=TOKENS,
            ROWS=4096 // columns,
            COLS=min(columns, 64 * WARPS),
            WARPS=WARPS,
            num_warps=WARPS,
            maxnreg=128,
        )
    return q, scale, transposed, dbias.sum(0)
