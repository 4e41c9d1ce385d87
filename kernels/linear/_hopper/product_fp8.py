"""Products of fp8 rows on compute capability 9.0 for the backward pass, in Gluon.

out[m, n] = sum_k a[m, k] * b[n, k]

The tensor cores add fp8 products in about 13 bits and cut the rest off: a sum over 131072 tokens of
values with a mean came out at a quarter of its size on one H100. After every step, 128 products,
their sum is added to one in float32 on the ordinary units: 2e-4 of such a sum is lost then, 1e-3 if
every second step is, 4e-3 if every fourth is. A tile of 192 x 128, 64 rows for each of three warp
groups, leaves them the registers for both sums, and the groups hide each other's additions.

A product over tokens has few tiles: `parts` cuts its sum, each part going to an output of its own.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from kernels._triton.rows import num_programs
from kernels.linear._hopper.forward import describe, tile_position

GROUP = 8
"""Tiles of rows that are computed before the next tile of columns."""
ROWS, BLOCK_N, BLOCK_K = 64, 128, 128
"""Rows of a warp group, columns of a tile, and depth of a step."""
MAX_PARTS = 16


@gluon.jit
def _produce(
    a, b, a_ring, b_ring, full, empty, tiles_m, tiles_n, steps, parts, steps_of_part,
    ROWS: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    count = 0
    tiles = tiles_m * tiles_n
    for place in range(gl.program_id(0), tiles * parts, gl.num_programs(0)):
        tile_m, tile_n = tile_position(place % tiles, tiles_m, tiles_n, GROUP)
        first = (place // tiles) * steps_of_part
        for step in range(first, gl.minimum(first + steps_of_part, steps)):
            stage = count % STAGES
            mbarrier.wait(empty.index(stage), ((count // STAGES) & 1) ^ 1)
            arrived = full.index(stage)
            mbarrier.expect(arrived, (3 * ROWS + BLOCK_N) * BLOCK_K)
            for group in gl.static_range(3):
                tma.async_copy_global_to_shared(
                    a,
                    [(tile_m * 3 + group) * ROWS, step * BLOCK_K],
                    arrived,
                    a_ring.index(stage * 3 + group),
                )
            tma.async_copy_global_to_shared(
                b, [tile_n * BLOCK_N, step * BLOCK_K], arrived, b_ring.index(stage)
            )
            count += 1


@gluon.jit
def _consume(
    INDEX: gl.constexpr, out, out_ptr, a_scale_ptr, b_scale_ptr, a_ring, b_ring, buffers, full,
    empty, M, N, tiles_m, tiles_n, steps, parts, steps_of_part, ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, HAS_SCALE: gl.constexpr,
):  # fmt: skip
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 32])
    count = 0
    tiles = tiles_m * tiles_n
    for place in range(gl.program_id(0), tiles * parts, gl.num_programs(0)):
        tile_m, tile_n = tile_position(place % tiles, tiles_m, tiles_n, GROUP)
        part = place // tiles
        first = part * steps_of_part
        total = gl.zeros([ROWS, BLOCK_N], gl.float32, LAYOUT)
        for _ in range(first, gl.minimum(first + steps_of_part, steps)):
            stage = count % STAGES
            mbarrier.wait(full.index(stage), (count // STAGES) & 1)
            short = warpgroup_mma(
                a_ring.index(stage * 3 + INDEX),
                b_ring.index(stage).permute((1, 0)),
                warpgroup_mma_init(gl.zeros([ROWS, BLOCK_N], gl.float32, LAYOUT)),
                use_acc=False,
                is_async=True,
            )
            total += warpgroup_mma_wait(0, deps=[short])
            mbarrier.arrive(empty.index(stage))
            count += 1
        row, col = (tile_m * 3 + INDEX) * ROWS, tile_n * BLOCK_N
        rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
        cols = col + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT))
        if HAS_SCALE:
            a_scale = gl.load(a_scale_ptr + rows, mask=rows < M, other=0.0)
            b_scale = gl.load(b_scale_ptr + cols, mask=cols < N, other=0.0)
            total = total * a_scale[:, None] * b_scale[None, :]
        if out is not None:
            buffer = buffers.index(INDEX)
            tma.store_wait(0)  # The last tile has left the buffer.
            buffer.store(total.to(out.dtype))
            fence_async_shared()
            tma.async_copy_shared_to_global(out, [row, col], buffer)
        else:
            offs = (part.to(gl.int64) * M + rows)[:, None] * N + cols[None, :]
            mask = (rows < M)[:, None] & (cols < N)[None, :]
            gl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=mask)
    if out is not None:
        tma.store_wait(0)


@gluon.jit
def _fp8_product_kernel(
    a,
    b,
    out,
    out_ptr,
    a_scale_ptr,
    b_scale_ptr,
    M,
    N,
    tiles_m,
    tiles_n,
    steps,
    parts,
    steps_of_part,
    ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    HAS_SCALE: gl.constexpr,
):
    a_ring = gl.allocate_shared_memory(a.dtype, [STAGES * 3, ROWS, BLOCK_K], a.layout)
    b_ring = gl.allocate_shared_memory(b.dtype, [STAGES, BLOCK_N, BLOCK_K], b.layout)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    buffers = a_ring
    if out is not None:
        buffers = gl.allocate_shared_memory(out.dtype, [3, ROWS, BLOCK_N], out.layout)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=3)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    0, out, out_ptr, a_scale_ptr, b_scale_ptr, a_ring, b_ring, buffers, full,
                    empty, M, N, tiles_m, tiles_n, steps, parts, steps_of_part,
                    ROWS, BLOCK_N, STAGES, GROUP, HAS_SCALE,
                ),
            ),
            (
                _consume,
                (
                    1, out, out_ptr, a_scale_ptr, b_scale_ptr, a_ring, b_ring, buffers, full,
                    empty, M, N, tiles_m, tiles_n, steps, parts, steps_of_part,
                    ROWS, BLOCK_N, STAGES, GROUP, HAS_SCALE,
                ),
            ),
            (
                _consume,
                (
                    2, out, out_ptr, a_scale_ptr, b_scale_ptr, a_ring, b_ring, buffers, full,
                    empty, M, N, tiles_m, tiles_n, steps, parts, steps_of_part,
                    ROWS, BLOCK_N, STAGES, GROUP, HAS_SCALE,
                ),
            ),
            (
                _produce,
                (
                    a, b, a_ring, b_ring, full, empty, tiles_m, tiles_n, steps, parts,
                    steps_of_part, ROWS, BLOCK_N, BLOCK_K, STAGES, GROUP,
                ),
            ),
        ],
        [4, 4, 1],
        [160, 160, 24],
    )  # fmt: skip


def fp8_product(
    a: Tensor, b: Tensor, scales: tuple[Tensor, Tensor] | None, dtype: torch.dtype
) -> Tensor:
    """Return a b^T (M, N) in `dtype`, times the scale of each row of a and of b.

    Args:
        a: (M, K) float8_e4m3fn, contiguous, K a multiple of 16.
        b: (N, K) as a.
        scales: (M,) and (N,) float32; or None, which may also cut the sum in parts.
        dtype: of the result; float32 for a sum in parts.
    """
    (M, K), N = a.shape, b.shape[0]
    if M == 0 or K == 0:
        return a.new_zeros(M, N, dtype=dtype)
    tiles_m, tiles_n = triton.cdiv(M, 3 * ROWS), triton.cdiv(N, BLOCK_N)
    steps, tiles = triton.cdiv(K, BLOCK_K), tiles_m * tiles_n
    parts = _parts(tiles, steps, a.device) if scales is None else 1
    steps_of_part = triton.cdiv(steps, parts)
    parts = triton.cdiv(steps, steps_of_part)  # None is empty.
    out = a.new_empty(parts, M, N, dtype=dtype)
    a_scale, b_scale = (None, None) if scales is None else scales
    # 16-bit rows at multiples of 16 bytes leave by TMA: written from registers, a row of dgrad at
    # D = 512 came in pieces of 16 bytes, at 3/4 of the speed.
    by_tma = dtype.itemsize == 2 and N % 8 == 0 and parts == 1
    _fp8_product_kernel[(num_programs(a.device, tiles * parts, 1),)](
        describe(a, ROWS, BLOCK_K),
        describe(b, BLOCK_N, BLOCK_K),
        describe(out[0], ROWS, BLOCK_N) if by_tma else None,
        out,
        a_scale,
        b_scale,
        M,
        N,
        tiles_m,
        tiles_n,
        steps,
        parts,
        steps_of_part,
        ROWS=ROWS,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        STAGES=4 if by_tma else 5,
        GROUP=GROUP,
        HAS_SCALE=scales is not None,
        num_warps=4,
    )
    return out[0] if parts == 1 else out.sum(0)


def _parts(tiles: int, steps: int, device: torch.device) -> int:
    """Return in how many parts to cut a sum so that the last wave of programs is nearly full.

    A function of the device and the shape alone, so that sums come out the same in every run.
    """
    processors = num_programs(device, 2**30, 1)

    def waste(parts: int) -> float:
        waves = triton.cdiv(tiles * parts, processors)
        # Each part writes and reads a whole result: about 1 % of a step's work, so few parts.
        return waves * processors / (tiles * parts) + 0.01 * parts

    return min(range(1, min(MAX_PARTS, steps) + 1), key=waste)
