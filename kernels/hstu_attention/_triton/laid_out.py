"""Keys and values copied between rows of the cache and rows in one place: both in one kernel.

Letters: R new tokens, C rows of the cache, G pages, H heads, K dim of keys, V dim of values.
"""

import triton
import triton.language as tl
from torch import Tensor

NUMBERS = 4096
"""Of keys, and as many of values, that a program copies."""


@triton.jit
def _copy_rows(
    cached_ptr, new_ptr, out_ptr, from_cache, from_new, row, is_old, is_new, num_rows,
    stride_cached, stride_new, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK)
    inside = (cols < WIDTH)[None, :]
    old = tl.load(
        cached_ptr + from_cache[:, None] * stride_cached + cols[None, :],
        mask=is_old[:, None] & inside, other=0,
    )  # fmt: skip
    new = tl.load(
        new_ptr + from_new[:, None] * stride_new + cols[None, :],
        mask=is_new[:, None] & inside, other=0,
    )  # fmt: skip
    values = tl.where(is_old[:, None], old, new)
    tl.store(
        out_ptr + row[:, None] * WIDTH + cols[None, :],
        values, mask=(row < num_rows)[:, None] & inside,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_new", "num_rows"])
def _laid_out_kernel(
    pages_ptr, length_ptr, cached_k_ptr, cached_v_ptr, k_ptr, v_ptr, out_k_ptr, out_v_ptr,
    stride_ck, stride_cv, stride_k, stride_v, num_new, num_rows,
    WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    PAGE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    length = tl.load(length_ptr)
    is_old = row < length
    page = tl.load(pages_ptr + row // PAGE, mask=is_old, other=0).to(tl.int64)
    from_cache = page * PAGE + row % PAGE
    from_new = row - length
    # What is neither is zero: the rows of hidden keys must be finite.
    is_new = (from_new >= 0) & (from_new < num_new)
    _copy_rows(
        cached_k_ptr, k_ptr, out_k_ptr, from_cache, from_new, row, is_old, is_new, num_rows,
        stride_ck, stride_k, WIDTH_K, BLOCK_K,
    )  # fmt: skip
    _copy_rows(
        cached_v_ptr, v_ptr, out_v_ptr, from_cache, from_new, row, is_old, is_new, num_rows,
        stride_cv, stride_v, WIDTH_V, BLOCK_V,
    )  # fmt: skip


@triton.jit
def _put_rows(
    source_ptr, kept_ptr, row, to, inside, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    cols = tl.arange(0, BLOCK)
    mask = inside[:, None] & (cols < WIDTH)[None, :]
    values = tl.load(source_ptr + row[:, None] * stride + cols[None, :], mask=mask, other=0)
    tl.store(kept_ptr + to[:, None] * WIDTH + cols[None, :], values, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _keep_kernel(
    k_ptr, v_ptr, rows_ptr, kept_k_ptr, kept_v_ptr, stride_k, stride_v, num_rows,
    WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    to = tl.load(rows_ptr + row, mask=inside, other=0)
    _put_rows(k_ptr, kept_k_ptr, row, to, inside, stride_k, WIDTH_K, BLOCK_K)
    _put_rows(v_ptr, kept_v_ptr, row, to, inside, stride_v, WIDTH_V, BLOCK_V)


def laid_out(
    pages_G: Tensor,
    length: Tensor,
    cached_k: Tensor,
    cached_v: Tensor,
    k: Tensor,
    v: Tensor,
    num_rows: int,
    page: int,
) -> tuple[Tensor, Tensor]:
    """Return (num_rows, H, K) keys and (num_rows, H, V) values; zeros behind the new ones.

    Args:
        pages_G: int32.
        length: (1,) int64, cached tokens.
        cached_k: (C, H, K).
        cached_v: (C, H, V).
        k: (R, H, K) of the new tokens.
        v: (R, H, V).
        num_rows: of the result.
        page: rows of a page.
    """
    cached_k, cached_v, k, v = (_with_whole_rows(x) for x in (cached_k, cached_v, k, v))
    out_k, out_v = k.new_empty(num_rows, *k.shape[1:]), v.new_empty(num_rows, *v.shape[1:])
    tile = _tile(k, v)
    _laid_out_kernel[(triton.cdiv(num_rows, tile["ROWS"]),)](
        pages_G, length, cached_k, cached_v, k, v, out_k, out_v,
        cached_k.stride(0), cached_v.stride(0), k.stride(0), v.stride(0), len(k), num_rows,
        PAGE=page, **tile,
    )  # fmt: skip
    return out_k, out_v


def keep_rows(k: Tensor, v: Tensor, rows_R: Tensor, kept_k: Tensor, kept_v: Tensor) -> None:
    """Write rows of keys and values to rows of the cache.

    Args:
        k: (R, H, K).
        v: (R, H, V).
        rows_R: int64, below C.
        kept_k: (C, H, K) contiguous.
        kept_v: (C, H, V) contiguous.
    """
    k, v = _with_whole_rows(k), _with_whole_rows(v)
    if not len(k):
        return
    tile = _tile(k, v)
    _keep_kernel[(triton.cdiv(len(k), tile["ROWS"]),)](
        k, v, rows_R, kept_k, kept_v, k.stride(0), v.stride(0), len(k), **tile
    )


def _tile(k: Tensor, v: Tensor) -> dict[str, int]:
    """Return how wide the rows of keys and values are, and how many a program copies."""
    widths = k.shape[1] * k.shape[2], v.shape[1] * v.shape[2]
    block_k, block_v = (triton.next_power_of_2(n) for n in widths)
    return {
        "WIDTH_K": widths[0],
        "WIDTH_V": widths[1],
        "BLOCK_K": block_k,
        "BLOCK_V": block_v,
        "ROWS": max(1, NUMBERS // max(block_k, block_v)),
    }


def _with_whole_rows(x: Tensor) -> Tensor:
    """Return x with the heads of a row side by side."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()
