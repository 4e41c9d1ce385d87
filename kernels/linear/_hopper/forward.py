"""Linear map on compute capability 9.0, in Gluon: the formula is that of _triton/linear.py.

A program has three warp groups. One warp loads tiles of x and of the weight by TMA into a ring of
buffers; two warp groups of four warps multiply them. Programs are persistent. Two schedules:

ping-pong    Each warp group owns a tile of 128 x 128. Their products take turns, so that the
             epilogue of one runs under the products of the other.
cooperative  Both share a tile of 128 x 256, 64 rows each: fewer bytes an operation, which counts
             more than the epilogue where rows are long.

Rows and columns past the end are zeros on loading and cut off on storing, by the TMA unit. fp8
inputs have a scale for each row of x and of the weight, applied to the float32 sum.
"""

import torch
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels._triton.launch import Tiles, launch
from kernels._triton.rows import num_programs
from kernels._triton.sizes import cdiv
from kernels.linear._hopper.epilogue import epilogue
from kernels.rotary.columns import Turn, turn_arguments

GROUP = 8
"""Tiles of rows that are computed before the next tile of columns."""
BLOCK_L = 128
"""Rows of a tile."""
STORE_F = 128
"""Columns that the epilogue stores at a time."""


@gluon.jit
def tile_position(tile, tiles_l, tiles_f, GROUP: gl.constexpr):
    """Return the row and column, in tiles, of the tile that comes at place `tile`."""
    group = tile // (GROUP * tiles_f)
    size = gl.minimum(tiles_l - group * GROUP, GROUP)
    inside = tile % (GROUP * tiles_f)
    return group * GROUP + inside % size, inside // size


@gluon.jit
def _produce(
    x, weight, x_ring, weight_ring, full, empty, tiles_l, tiles_f, steps,
    BLOCK_F: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    PARTS: gl.constexpr, ROWS: gl.constexpr, BYTES: gl.constexpr,
):  # fmt: skip
    step = 0
    for tile in range(gl.program_id(0), tiles_l * tiles_f, gl.num_programs(0)):
        tile_l, tile_f = tile_position(tile, tiles_l, tiles_f, GROUP)
        for d in range(steps):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            arrived = full.index(stage)
            mbarrier.expect(arrived, BYTES)
            for part in gl.static_range(PARTS):
                tma.async_copy_global_to_shared(
                    x,
                    [(tile_l * PARTS + part) * ROWS, d * BLOCK_D],
                    arrived,
                    x_ring.index(stage * PARTS + part),
                )
            tma.async_copy_global_to_shared(
                weight, [tile_f * BLOCK_F, d * BLOCK_D], arrived, weight_ring.index(stage)
            )
            step += 1


@gluon.jit
def _prefetch(pointers):
    """Bring what pointers point at into the L1 cache."""
    gl.inline_asm_elementwise(
        "prefetch.global.L1 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [pointers],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _consume(
    GROUP_INDEX: gl.constexpr, y, kept, residual, bias_ptr, x_scale_ptr, weight_scale_ptr,
    x_ring, weight_ring, buffers, full, empty, turns, residual_full, L, F, tiles_l, tiles_f, steps,
    silu_columns, q_cos_ptr, q_sin_ptr, q_first, k_cos_ptr, k_sin_ptr, k_first,
    H: gl.constexpr, K: gl.constexpr, PER_HEAD: gl.constexpr,
    BLOCK_F: gl.constexpr, STORE_F: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr, PING_PONG: gl.constexpr, ROWS: gl.constexpr, DEPTH: gl.constexpr,
    HAS_SCALE: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr,
    SILU: gl.constexpr, KEEP: gl.constexpr,
):  # fmt: skip
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_F, DEPTH])
    STORE_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STORE_F, DEPTH])
    PARTS: gl.constexpr = 1 if PING_PONG else 2
    HALVES: gl.constexpr = BLOCK_F // STORE_F
    BUFFERS: gl.constexpr = HALVES if HAS_RESIDUAL else 1
    step = 0
    turn = 0  # Of this warp group: how many tiles it has done.
    first = gl.program_id(0)
    stride = gl.num_programs(0)
    if PING_PONG:
        first += GROUP_INDEX * stride
        step = GROUP_INDEX * steps
        stride = 2 * stride
    for tile in range(first, tiles_l * tiles_f, stride):
        tile_l, tile_f = tile_position(tile, tiles_l, tiles_f, GROUP)
        row = tile_l * PARTS * ROWS
        if not PING_PONG:
            row += GROUP_INDEX * ROWS
        col = tile_f * BLOCK_F
        z = warpgroup_mma_init(gl.zeros([ROWS, BLOCK_F], gl.float32, LAYOUT))
        if HAS_RESIDUAL:
            tma.store_wait(0)
            arrived = residual_full.index(GROUP_INDEX)
            mbarrier.expect(arrived, ROWS * BLOCK_F * 2)
            for half in gl.static_range(HALVES):
                tma.async_copy_global_to_shared(
                    residual,
                    [row, col + half * STORE_F],
                    arrived,
                    buffers.index(GROUP_INDEX * BUFFERS + half),
                )
        if PING_PONG:
            # Warp group 0 begins: nobody has given it its first turn.
            mbarrier.wait(turns.index(GROUP_INDEX), (turn & 1) ^ (1 - GROUP_INDEX))
        if HAS_SCALE and not PING_PONG:
            # Nothing runs under this epilogue: what it reads is fetched under the products. At
            # D = 1024 on one H100 1.39 instead of 1.48 ms.
            LANES: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
            some = col + gl.arange(0, 128, LANES) * (BLOCK_F // 128)
            _prefetch(weight_scale_ptr + gl.minimum(some, F - 1))
            _prefetch(x_scale_ptr + gl.minimum(row + gl.arange(0, 128, LANES), L - 1))
            if HAS_BIAS:
                _prefetch(bias_ptr + gl.minimum(some, F - 1))
        for d in range(steps):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            a = x_ring.index(stage if PING_PONG else stage * 2 + GROUP_INDEX)
            z = warpgroup_mma(a, weight_ring.index(stage).permute((1, 0)), z, is_async=True)
            z = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[z]))
            if d > 0:
                mbarrier.arrive(empty.index((step - 1) % STAGES))
            step += 1
        if PING_PONG:
            mbarrier.arrive(turns.index(1 - GROUP_INDEX))
        total = warpgroup_mma_wait(0, deps=[z])
        mbarrier.arrive(empty.index((step - 1) % STAGES))
        if HALVES == 1:
            epilogue(
                total, row, col, bias_ptr, x_scale_ptr, weight_scale_ptr, y, kept,
                buffers.index(GROUP_INDEX * BUFFERS), residual_full.index(GROUP_INDEX), turn & 1,
                L, F, silu_columns, q_cos_ptr, q_sin_ptr, q_first, k_cos_ptr, k_sin_ptr, k_first,
                H, K, PER_HEAD, LAYOUT, ROWS, STORE_F,
                HAS_SCALE, HAS_BIAS, HAS_RESIDUAL, SILU, KEEP,
            )  # fmt: skip
        else:
            pairs = total.reshape((ROWS, 2, STORE_F)).permute((0, 2, 1))
            left, right = pairs.split()
            epilogue(
                gl.convert_layout(left, STORE_LAYOUT), row, col, bias_ptr, x_scale_ptr,
                weight_scale_ptr, y, kept,
                buffers.index(GROUP_INDEX * BUFFERS), residual_full.index(GROUP_INDEX), turn & 1,
                L, F, silu_columns, q_cos_ptr, q_sin_ptr, q_first, k_cos_ptr, k_sin_ptr, k_first,
                H, K, PER_HEAD, STORE_LAYOUT, ROWS, STORE_F,
                HAS_SCALE, HAS_BIAS, HAS_RESIDUAL, SILU, KEEP,
            )  # fmt: skip
            epilogue(
                gl.convert_layout(right, STORE_LAYOUT), row, col + STORE_F, bias_ptr, x_scale_ptr,
                weight_scale_ptr, y, kept, buffers.index(GROUP_INDEX * BUFFERS + BUFFERS - 1),
                residual_full.index(GROUP_INDEX), turn & 1,
                L, F, silu_columns, q_cos_ptr, q_sin_ptr, q_first, k_cos_ptr, k_sin_ptr, k_first,
                H, K, PER_HEAD, STORE_LAYOUT, ROWS, STORE_F,
                HAS_SCALE, HAS_BIAS, HAS_RESIDUAL, SILU, KEEP,
            )  # fmt: skip
        if PING_PONG:
            step += steps
        turn += 1  # noqa: SIM113, a kernel has no enumerate
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["L", "tiles_l"])
def _linear_fwd_kernel(
    x,
    weight,
    y,
    kept,
    residual,
    bias_ptr,
    x_scale_ptr,
    weight_scale_ptr,
    L,
    F,
    tiles_l,
    tiles_f,
    steps,
    silu_columns,
    q_cos_ptr,
    q_sin_ptr,
    q_first,
    k_cos_ptr,
    k_sin_ptr,
    k_first,
    H: gl.constexpr,
    K: gl.constexpr,
    PER_HEAD: gl.constexpr,
    BLOCK_F: gl.constexpr,
    BLOCK_D: gl.constexpr,
    STORE_F: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    PING_PONG: gl.constexpr,
    ROWS: gl.constexpr,
    HAS_SCALE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    SILU: gl.constexpr,
    KEEP: gl.constexpr,
):
    PARTS: gl.constexpr = 1 if PING_PONG else 2
    BUFFERS: gl.constexpr = BLOCK_F // STORE_F if HAS_RESIDUAL else 1
    ITEM: gl.constexpr = x.dtype.primitive_bitwidth // 8
    x_ring = gl.allocate_shared_memory(x.dtype, [STAGES * PARTS, ROWS, BLOCK_D], x.layout)
    weight_ring = gl.allocate_shared_memory(weight.dtype, [STAGES, BLOCK_F, BLOCK_D], weight.layout)
    buffers = gl.allocate_shared_memory(y.dtype, [2 * BUFFERS, ROWS, STORE_F], y.layout)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    residual_full = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=PARTS)
    for index in gl.static_range(2):
        mbarrier.init(turns.index(index), count=1)
        mbarrier.init(residual_full.index(index), count=1)
    fence_async_shared()
    DEPTH: gl.constexpr = 256 // x.dtype.primitive_bitwidth
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    0, y, kept, residual, bias_ptr, x_scale_ptr, weight_scale_ptr,
                    x_ring, weight_ring, buffers, full, empty, turns, residual_full,
                    L, F, tiles_l, tiles_f, steps, silu_columns,
                    q_cos_ptr, q_sin_ptr, q_first, k_cos_ptr, k_sin_ptr, k_first, H, K, PER_HEAD,
                    BLOCK_F, STORE_F, STAGES, GROUP, PING_PONG, ROWS, DEPTH,
                    HAS_SCALE, HAS_BIAS, HAS_RESIDUAL, SILU, KEEP,
                ),
            ),
            (
                _consume,
                (
                    1, y, kept, residual, bias_ptr, x_scale_ptr, weight_scale_ptr,
                    x_ring, weight_ring, buffers, full, empty, turns, residual_full,
                    L, F, tiles_l, tiles_f, steps, silu_columns,
                    q_cos_ptr, q_sin_ptr, q_first, k_cos_ptr, k_sin_ptr, k_first, H, K, PER_HEAD,
                    BLOCK_F, STORE_F, STAGES, GROUP, PING_PONG, ROWS, DEPTH,
                    HAS_SCALE, HAS_BIAS, HAS_RESIDUAL, SILU, KEEP,
                ),
            ),
            (
                _produce,
                (
                    x, weight, x_ring, weight_ring, full, empty, tiles_l, tiles_f, steps,
                    BLOCK_F, BLOCK_D, STAGES, GROUP, PARTS, ROWS,
                    (PARTS * ROWS + BLOCK_F) * BLOCK_D * ITEM,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


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
    turns: tuple[Turn | None, Turn | None] = (None, None),
) -> tuple[Tensor, Tensor]:
    """Return y (L, F), and z (L, F) if `keep`, else an empty tensor.

    Args:
        x: (L, D), columns contiguous, rows at multiples of 16 bytes.
        weight: (F, D) contiguous, dtype of x.
        bias: (F,) contiguous.
        residual: (L, F), columns contiguous, dtype of y.
        silu_columns: y = silu(z) in so many first columns.
        keep: whether z is stored.
        scales: (L,) and (F,) float32, of the rows of x and of weight; for fp8 only.
        dtype: of y and z, 16 bits; None for that of x.
        turns: which columns of y are turned, of queries and of keys.
    """
    (L, D), F = x.shape, weight.shape[0]
    y = x.new_empty(L, F, dtype=dtype)
    kept = x.new_empty(L if keep else 0, F, dtype=dtype)
    if L == 0:
        return y, kept
    ping_pong, block_f, stages = _schedule(x, F, residual is not None, silu_columns > 0)
    block_d = 128 // x.element_size()
    rows = BLOCK_L if ping_pong else BLOCK_L // 2
    tiles_l, tiles_f = cdiv(L, BLOCK_L), cdiv(F, block_f)
    target = _tiles(y, rows, STORE_F)
    x_scale, weight_scale = (None, None) if scales is None else scales
    turned, heads = turn_arguments(*turns)
    launch(
        _linear_fwd_kernel,
        (num_programs(x.device, tiles_l * tiles_f, 1), 1, 1),
        [
            _tiles(x, rows, block_d),
            _tiles(weight, block_f, block_d),
            target,
            _tiles(kept, rows, STORE_F) if keep else target,
            target if residual is None else _tiles(residual, rows, STORE_F),
            bias,
            x_scale,
            weight_scale,
            L,
            F,
            tiles_l,
            tiles_f,
            cdiv(D, block_d),
            silu_columns,
            *turned,
        ],
        {
            **heads,
            "BLOCK_F": block_f,
            "BLOCK_D": block_d,
            "STORE_F": STORE_F,
            "STAGES": stages,
            "GROUP": GROUP,
            "PING_PONG": ping_pong,
            "ROWS": rows,
            "HAS_SCALE": scales is not None,
            "HAS_BIAS": bias is not None,
            "HAS_RESIDUAL": residual is not None,
            "SILU": silu_columns > 0,
            "KEEP": keep,
        },
    )
    return y, kept


def _schedule(x: Tensor, F: int, has_residual: bool, has_silu: bool) -> tuple[bool, int, int]:
    """Return (ping-pong?, columns of a tile, buffers of the ring), as was faster on one H100.

    Long rows are bound by the loads of tiles, which a large tile makes fewer; but in fp8 products
    are so short that the epilogue of SiLU weighs more, except at 512 bytes.
    """
    row_bytes = x.shape[1] * x.element_size()
    if x.element_size() == 1 and has_silu:
        ping_pong = not 512 <= row_bytes < 1024
    elif x.element_size() == 1 or has_residual:
        ping_pong = row_bytes <= 1024
    else:
        ping_pong = row_bytes < 1024
    if ping_pong or F <= STORE_F:
        return True, 128, 5
    # A residual tile of 128 x 256 takes the room of a buffer of the ring.
    return False, 256, 3 if has_residual else 4


def _tiles(tensor: Tensor, rows: int, columns: int) -> Tiles:
    return Tiles(tensor, [*tensor.shape], [*tensor.stride()], [rows, columns])


def describe(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Return a descriptor that moves (rows, columns) at a time."""
    return _tiles(tensor, rows, columns).describe()
