"""Rows of a jagged result: each read once and written once, whatever the lengths, in one launch.

A program owns neighbouring rows of the result and finds the sequence of each by binary search in
the offsets, so that no program idles on short sequences and the host knows the row count alone.
The rows' sources are those of reference.py.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.sizes import cdiv, next_power_of_2
from kernels.jagged.reference import Operator


@triton.jit
def _start_b(b_offsets_ptr, i, N, mask, OPERATOR: tl.constexpr):
    if OPERATOR == "to_padded" or OPERATOR == "from_padded":
        return i.to(tl.int64) * N
    else:
        return tl.load(b_offsets_ptr + i, mask=mask, other=0)


@triton.jit
def _start_out(a_offsets_ptr, b_offsets_ptr, i, N, mask, OPERATOR: tl.constexpr):
    if OPERATOR == "concat":
        a = tl.load(a_offsets_ptr + i, mask=mask, other=0)
        return a + _start_b(b_offsets_ptr, i, N, mask, OPERATOR)
    elif OPERATOR == "split_b" or OPERATOR == "newest" or OPERATOR == "to_padded":
        return _start_b(b_offsets_ptr, i, N, mask, OPERATOR)
    else:
        return tl.load(a_offsets_ptr + i, mask=mask, other=0)


@triton.jit
def _sources(a, length_a, b, length_b, OPERATOR: tl.constexpr):
    """Return first_start, count and second_start."""
    if OPERATOR == "concat":
        return a, length_a, b
    elif OPERATOR == "split_a":
        return a + b, length_a, b
    elif OPERATOR == "split_b":
        return a + b + length_a, length_b, b
    elif OPERATOR == "newest":
        return a + length_a - length_b, length_b, b
    elif OPERATOR == "oldest_zero":
        return a, length_a - length_b, b
    elif OPERATOR == "to_padded":
        return a, tl.minimum(length_a, length_b), b
    else:
        return b, tl.minimum(length_a, length_b), a


@triton.jit
def _gather_kernel(
    first_ptr,
    second_ptr,
    out_ptr,
    a_offsets_ptr,
    b_offsets_ptr,
    num_rows,
    num_first,
    num_second,
    stride_first,
    stride_second,
    fill,
    N,
    B,
    D: tl.constexpr,
    SEARCH_STEPS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_SECOND: tl.constexpr,
    OPERATOR: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    # The sequence of a row: how many sequences end at or before it.
    low = tl.zeros((BLOCK_L,), tl.int32)
    high = tl.zeros((BLOCK_L,), tl.int32) + B
    for _ in range(SEARCH_STEPS):
        searching = low < high
        middle = (low + high) // 2
        end = _start_out(a_offsets_ptr, b_offsets_ptr, middle + 1, N, searching, OPERATOR)
        after = searching & (end <= rows)
        low = tl.where(after, middle + 1, low)
        high = tl.where(searching & (end > rows), middle, high)
    inside = (rows < num_rows) & (low < B)
    a = tl.load(a_offsets_ptr + low, mask=inside, other=0)
    length_a = tl.load(a_offsets_ptr + low + 1, mask=inside, other=0) - a
    b = _start_b(b_offsets_ptr, low, N, inside, OPERATOR)
    length_b = _start_b(b_offsets_ptr, low + 1, N, inside, OPERATOR) - b
    first_start, count, second_start = _sources(a, length_a, b, length_b, OPERATOR)
    local = rows - _start_out(a_offsets_ptr, b_offsets_ptr, low, N, inside, OPERATOR)
    in_first = inside & (local < count)

    wanted = (cols < D)[None, :]
    value = tl.full((BLOCK_L, BLOCK_D), fill, out_ptr.dtype.element_ty)
    if HAS_FIRST:
        source = first_start + local
        mask = (in_first & (source >= 0) & (source < num_first))[:, None] & wanted
        found = tl.load(first_ptr + source[:, None] * stride_first + cols[None, :], mask=mask)
        value = tl.where(mask, found, value)
    if HAS_SECOND:
        in_second = inside & (local >= count)
        source = second_start + local - count
        mask = (in_second & (source >= 0) & (source < num_second))[:, None] & wanted
        found = tl.load(second_ptr + source[:, None] * stride_second + cols[None, :], mask=mask)
        value = tl.where(mask, found, value)
    out = out_ptr + rows[:, None] * D + cols[None, :]
    tl.store(out, value, mask=(rows < num_rows)[:, None] & wanted)


def gather(
    operator: Operator,
    num_rows: int,
    a_offsets: Tensor,
    b_offsets: Tensor | int,
    first: Tensor | None,
    second: Tensor | None = None,
    fill: float = 0.0,
) -> Tensor:
    """Return the (num_rows, D) rows of a result: arguments as of reference.gather.

    Sources may have any row stride. Offsets that point outside a source give filled rows, never a
    read outside it.
    """
    source = first if first is not None else second
    assert source is not None
    D = source.shape[1]
    out = source.new_empty(num_rows, D)
    if out.numel() == 0:
        return out
    sources = [x if x is None or x.stride(1) == 1 else x.contiguous() for x in (first, second)]
    padded = isinstance(b_offsets, int)
    B = a_offsets.numel() - 1
    block_d = min(1024, next_power_of_2(D))
    block_l = max(1, 4096 // max(block_d, 16))
    _gather_kernel[(cdiv(num_rows, block_l), cdiv(D, block_d))](
        *sources,
        out,
        a_offsets.contiguous(),
        None if padded else b_offsets.contiguous(),
        num_rows,
        *(0 if x is None else x.shape[0] for x in sources),
        *(0 if x is None else x.stride(0) for x in sources),
        float(fill),
        b_offsets if padded else 0,
        B,
        D=D,
        SEARCH_STEPS=max(1, B.bit_length()),
        BLOCK_L=block_l,
        BLOCK_D=block_d,
        HAS_FIRST=first is not None,
        HAS_SECOND=second is not None,
        OPERATOR=operator,
        num_warps=4,
    )
    return out
