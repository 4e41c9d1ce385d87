"""Rounding to fp8 e4m3 inside kernels, with a power of two as the scale of each row.

scale = the least power of two with amax / scale <= 448, never below 2^-60; q = round(x / scale) to
the nearest, ties to even. The quotient is exact, so that q is rounded once.
"""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""The interpreter cuts digits off where the GPU rounds, and cannot run PTX."""
# Bits of 2^-60 and of 448 = 1.75 * 2^8: the fraction of 1.75.
_LEAST_EXPONENT = tl.constexpr(127 - 60)
_TOP_FRACTION = tl.constexpr(0x600000)


@triton.jit
def row_scale(amax):
    """Return the scale of rows with these largest magnitudes, and its inverse; float32.

    Where amax is not finite the scale is NaN and the inverse 0. NaN must have been made infinite.
    """
    bits = amax.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > _TOP_FRACTION).to(tl.int32)
    exponent = tl.maximum(exponent, _LEAST_EXPONENT)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    finite = amax < float("inf")
    return tl.where(finite, scale, float("nan")), tl.where(finite, inverse, 0.0)


@triton.jit
def row_amax(x):
    """Return the largest magnitude of each row of (ROWS, COLS) float32; infinity for NaN."""
    # A maximum may pass over NaN.
    return tl.max(tl.where(x == x, tl.abs(x), float("inf")), 1)


@triton.jit
def to_e4m3(x):
    """Return float32 x, at most 448 in magnitude, rounded to e4m3."""
    if INTERPRETED:
        x = _rounded(x)
    return x.to(tl.float8e4nv)


@triton.jit
def quantize_tile(x):
    """Return q and scale (ROWS,) of whole rows (ROWS, COLS) in float32; q is 0 where scale is NaN.

    What is masked out of the rows must be 0.
    """
    scale, inverse = row_scale(row_amax(x))
    scaled = tl.where((inverse > 0)[:, None], x * inverse[:, None], 0.0)
    return to_e4m3(scaled), scale


@triton.jit
def pack_e4m3(x0, x1, x2, x3):
    """Return four float32 tiles as e4m3 bytes of int32, x0 the lowest; 448 where above it.

    In PTX: Triton 3.6 put wrong bytes together, without an error, where a kernel packed values that
    it had converted itself.
    """
    if INTERPRETED:
        word = _byte(x0) | (_byte(x1) << 8) | (_byte(x2) << 16) | (_byte(x3) << 24)
    else:
        word = tl.inline_asm_elementwise(
            """{
            .reg .b16 low, high;
            cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
            cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
            mov.b32 $0, {low, high};
            }""",
            "=r,f,f,f,f",
            [x0, x1, x2, x3],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return word


@triton.jit
def _byte(x):
    x = tl.where(x > 448.0, 448.0, tl.where(x < -448.0, -448.0, x))
    return _rounded(x).to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)


@triton.jit
def _rounded(x):
    """Return x rounded to the digits of e4m3, as float32."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
    # Below 2^-6 e4m3 has steps of 2^-9: a sum with 1.5 * 2^14 keeps that many digits.
    small = (x + 24576.0) - 24576.0
    small = tl.where(small == 0.0, x * 0.0, small)  # Keeps the sign.
    return tl.where(tl.abs(x) < 0.015625, small, rounded.to(tl.float32, bitcast=True))
