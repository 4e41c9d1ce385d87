"""SiLU and its derivative inside kernels.

FAST uses one tanh of the special-function unit, whose relative error of 2^-11 is below the rounding
of 16-bit results; otherwise the sigmoid is exact. The interpreter cannot run the instruction.
"""

import os

import torch
import triton
import triton.language as tl


def is_fast(dtype: torch.dtype) -> bool:
    """Return the value of FAST for tensors of `dtype`."""
    return dtype != torch.float32 and os.environ.get("TRITON_INTERPRET") != "1"


@triton.jit
def sigmoid(x, FAST: tl.constexpr):
    """Return 1 / (1 + exp(-x)), float32."""
    if FAST:
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x * 0.5], dtype=tl.float32, is_pure=True, pack=1
        )
        return tanh * 0.5 + 0.5
    else:
        return tl.sigmoid(x)


@triton.jit
def silu(x, FAST: tl.constexpr):
    """Return x * sigmoid(x), float32; FAST with the bits of the Hopper kernels."""
    if FAST:
        half = x * 0.5
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [half], dtype=tl.float32, is_pure=True, pack=1
        )
        return tl.fma(half, tanh, half)
    else:
        return x * tl.sigmoid(x)


@triton.jit
def silu_derivative(x, FAST: tl.constexpr):
    """Return the derivative of silu at x, float32."""
    s = sigmoid(x, FAST)
    return s + x * s * (1.0 - s)
