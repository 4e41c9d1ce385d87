"""Rotary angles inside kernels: neighbouring columns of queries and keys turned in registers.

Where a kernel turns, the pair p of a head stands in columns 2 p and 2 p + 1, not in p and p + P: a
thread then holds both. Scores do not depend on the order of columns, which queries and keys share.
"""

import triton
import triton.language as tl


@triton.jit
def turn(
    x,
    rows,
    first_col,
    L,
    cos_ptr,
    sin_ptr,
    begin,
    H: tl.constexpr,
    K: tl.constexpr,
    PER_HEAD: tl.constexpr,
    BACK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Return x (ROWS, COLS), float32 columns first_col .., with those of H heads turned.

    The heads' columns are begin .. begin + H K - 1; others stay as they are. cos and sin are
    (L, 1 or H, K / 2) float32; BACK turns the other way.
    """
    if (first_col + COLS > begin) & (first_col < begin + H * K):
        P: tl.constexpr = K // 2
        at = first_col - begin + 2 * tl.arange(0, COLS // 2)
        inside = (rows < L)[:, None] & ((at >= 0) & (at < H * K))[None, :]
        angle = (at % K) // 2
        if PER_HEAD:
            angle += (at // K) * P
        G: tl.constexpr = H if PER_HEAD else 1
        offs = rows.to(tl.int64)[:, None] * (G * P) + angle[None, :]
        cos = tl.load(cos_ptr + offs, mask=inside, other=1.0)
        sin = tl.load(sin_ptr + offs, mask=inside, other=0.0)
        if BACK:
            sin = -sin
        a, b = tl.split(tl.reshape(x, (ROWS, COLS // 2, 2)))
        # By name, for every kernel that turns must give the same bits.
        turned_a = tl.fma(a, cos, -(b * sin))
        turned_b = tl.fma(a, sin, b * cos)
        x = tl.reshape(tl.join(turned_a, turned_b), (ROWS, COLS))
    return x
