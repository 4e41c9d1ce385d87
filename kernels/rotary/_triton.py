"""Rotary embedding: pairs (p, p + P) of each head turned by their angle; one read, one write.

    y[p] = x[p] cos - x[p + P] sin,    y[p + P] = x[p] sin + x[p + P] cos

L tokens, H heads, P pairs, G sets of angles. The gradient is the same with sin negated.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.sizes import cdiv, next_power_of_2

PAIRS = 2048
"""Pairs that a program holds."""


@triton.jit
def _rotary_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    y_ptr,
    L,
    stride_token,
    stride_head,
    H: tl.constexpr,
    P: tl.constexpr,
    PER_HEAD: tl.constexpr,
    BACK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    pairs = tl.arange(0, BLOCK_P)
    mask = (rows < L)[:, None] & (pairs < P)[None, :]
    angles = rows[:, None] * P + pairs[None, :]
    if not PER_HEAD:
        cos = tl.load(cos_ptr + angles, mask=mask, other=0.0)
        sin = tl.load(sin_ptr + angles, mask=mask, other=0.0)
    for head in tl.static_range(H):
        if PER_HEAD:
            of_head = rows[:, None] * (H * P) + head * P + pairs[None, :]
            cos = tl.load(cos_ptr + of_head, mask=mask, other=0.0)
            sin = tl.load(sin_ptr + of_head, mask=mask, other=0.0)
        x = x_ptr + rows[:, None] * stride_token + head * stride_head + pairs[None, :]
        a = tl.load(x, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x + P, mask=mask, other=0.0).to(tl.float32)
        turn = -sin if BACK else sin
        y = y_ptr + rows[:, None] * (2 * H * P) + head * 2 * P + pairs[None, :]
        tl.store(y, (a * cos - b * turn).to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(y + P, (a * turn + b * cos).to(y_ptr.dtype.element_ty), mask=mask)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    """Launch the kernel.

    Args:
        x: (L, H, 2 P), columns contiguous.
        cos: (L, G, P) float32, contiguous.
        sin: (L, G, P) float32, contiguous.
        back: turn the other way.
    """
    L, H, K = x.shape
    y = torch.empty((L, H, K), dtype=x.dtype, device=x.device)
    if L == 0:
        return y
    block = next_power_of_2(K // 2)
    rows = max(1, PAIRS // block)
    _rotary_kernel[(cdiv(L, rows),)](
        x,
        cos,
        sin,
        y,
        L,
        x.stride(0),
        x.stride(1),
        H=H,
        P=K // 2,
        PER_HEAD=cos.shape[1] > 1,
        BACK=back,
        ROWS=rows,
        BLOCK_P=block,
        num_warps=4,
    )
    return y
