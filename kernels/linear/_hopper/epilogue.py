"""What happens to a tile of products before it is stored: forward.py says where it comes from."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from kernels.linear._hopper.turn import turn


@gluon.jit
def _store(value, target, row, col, buffer):
    """Store a tile through a buffer, once the buffer's last tile has left it."""
    tma.store_wait(0)
    buffer.store(value.to(target.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(target, [row, col], buffer)


@gluon.jit
def epilogue(
    z, row, col, bias_ptr, x_scale_ptr, weight_scale_ptr, y, kept, buffer, arrived, phase, L, F,
    silu_columns, q_cos_ptr, q_sin_ptr, q_first, k_cos_ptr, k_sin_ptr, k_first,
    H: gl.constexpr, K: gl.constexpr, PER_HEAD: gl.constexpr,
    LAYOUT: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr,
    HAS_SCALE: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr,
    SILU: gl.constexpr, KEEP: gl.constexpr,
):  # fmt: skip
    """Store y of z, the float32 sums of a tile, and z itself in `kept` if KEEP."""
    cols = col + gl.arange(0, COLS, gl.SliceLayout(0, LAYOUT))
    if HAS_SCALE:
        rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
        x_scale = gl.load(x_scale_ptr + rows, mask=rows < L, other=0.0)
        weight_scale = gl.load(weight_scale_ptr + cols, mask=cols < F, other=0.0)
        z = z * x_scale[:, None] * weight_scale[None, :]
    if HAS_BIAS:
        z += gl.load(bias_ptr + cols, mask=cols < F, other=0.0).to(gl.float32)[None, :]
    if KEEP:
        _store(z, kept, row, col, buffer)
    if SILU or q_cos_ptr is not None or k_cos_ptr is not None:
        # Of the rounded z, kept or not: the backward pass, which has no other, sees the same.
        z = z.to(y.dtype).to(gl.float32)
    if SILU:
        # silu(z) = h + h * tanh(h) with h = z / 2: one special-function instruction.
        half = z * 0.5
        tanh = gl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [half], dtype=gl.float32, is_pure=True, pack=1
        )
        z = gl.where((cols < silu_columns)[None, :], gl.fma(half, tanh, half), z)
    if q_cos_ptr is not None:
        z = turn(z, row, col, L, q_cos_ptr, q_sin_ptr, q_first, H, K, PER_HEAD, LAYOUT)
    if k_cos_ptr is not None:
        z = turn(z, row, col, L, k_cos_ptr, k_sin_ptr, k_first, H, K, PER_HEAD, LAYOUT)
    if HAS_RESIDUAL:
        # It came into the buffer that the result leaves from.
        mbarrier.wait(arrived, phase)
        z += buffer.load(LAYOUT).to(gl.float32)
        buffer.store(z.to(y.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(y, [row, col], buffer)
    else:
        _store(z, y, row, col, buffer)
