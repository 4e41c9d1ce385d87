"""What both passes write: dropout, and the parts of the result side by side."""

import triton
import triton.language as tl


@triton.jit
def _mix(x):
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def make_row_keys(seed_ptr, rows):
    """Return the random bits of each row."""
    seed = tl.load(seed_ptr)
    low = seed.to(tl.uint32)
    high = (seed >> 32).to(tl.uint32)
    return _mix(_mix(low + rows.to(tl.uint32) * 0x9E3779B9) ^ high)


@triton.jit
def dropped(y, row_keys, channels, threshold, scale):
    """Return y / (1 - dropout) where it is kept, else 0: kept() in reference.py."""
    drawn = _mix(row_keys[:, None] ^ (channels.to(tl.uint32) * 0x85EBCA6B)[None, :]) >> 8
    return tl.where(drawn.to(tl.int32) >= threshold, y * scale, 0.0)


@triton.jit
def store_out(
    out,
    u,
    x,
    y,
    row_keys,
    channels,
    mask,
    threshold,
    scale,
    C: tl.constexpr,
    CONCAT: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """Write y, or u, x and y side by side, after dropout; `out` points at the first."""
    dtype: tl.constexpr = out.dtype.element_ty
    if CONCAT:
        if DROPOUT:
            u = dropped(u, row_keys, channels, threshold, scale)
            x = dropped(x, row_keys, channels + C, threshold, scale)
        tl.store(out, u.to(dtype), mask=mask)
        tl.store(out + C, x.to(dtype), mask=mask)
        out += 2 * C
        channels += 2 * C
    if DROPOUT:
        y = dropped(y, row_keys, channels, threshold, scale)
    tl.store(out, y.to(dtype), mask=mask)
