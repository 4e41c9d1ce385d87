"""Rotary angles in the epilogue: kernels/_triton/turn.py, whose bits these are, in Gluon."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def turn(
    x, row, first_col, L, cos_ptr, sin_ptr, begin,
    H: gl.constexpr, K: gl.constexpr, PER_HEAD: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Return x, rows `row` .. and columns first_col .. in float32, with those of H heads turned.

    A thread of the products' layout holds both columns of a pair: nothing is exchanged.
    """
    if (first_col + x.shape[1] > begin) & (first_col < begin + H * K):
        P: gl.constexpr = K // 2
        G: gl.constexpr = H if PER_HEAD else 1
        ROWS: gl.constexpr = x.shape[0]
        PAIRS: gl.constexpr = x.shape[1] // 2
        a, b = x.reshape((ROWS, PAIRS, 2)).split()
        PAIR_LAYOUT: gl.constexpr = a.type.layout
        rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, PAIR_LAYOUT))
        at = first_col - begin + 2 * gl.arange(0, PAIRS, gl.SliceLayout(0, PAIR_LAYOUT))
        inside = (rows < L)[:, None] & ((at >= 0) & (at < H * K))[None, :]
        angle = (at % K) // 2
        if PER_HEAD:
            angle += (at // K) * P
        offs = rows.to(gl.int64)[:, None] * (G * P) + angle[None, :]
        cos = gl.load(cos_ptr + offs, mask=inside, other=1.0)
        sin = gl.load(sin_ptr + offs, mask=inside, other=0.0)
        turned_a = gl.fma(a, cos, -(b * sin))
        turned_b = gl.fma(a, sin, b * cos)
        x = gl.convert_layout(gl.join(turned_a, turned_b).reshape((ROWS, 2 * PAIRS)), LAYOUT)
    return x
