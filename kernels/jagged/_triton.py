"""Rows of a jagged result: each read once and written once, whatever the lengths.

A program owns neighbouring rows of the result and finds the sequence of each by binary search in
the offsets, so that no program idles on short sequences and the host knows the row count alone.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.jagged.plan import Plan


@triton.jit
def _gather_kernel(
    first_ptr,
    second_ptr,
    out_ptr,
    out_offsets_ptr,
    first_start_ptr,
    first_count_ptr,
    second_start_ptr,
    num_rows,
    num_first,
    num_second,
    stride_first,
    stride_second,
    fill,
    B,
    D: tl.constexpr,
    SEARCH_STEPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_SECOND: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    # The sequence of a row: how many sequences end at or before it.
    low = tl.zeros((BLOCK_N,), tl.int32)
    high = tl.zeros((BLOCK_N,), tl.int32) + B
    for _ in range(SEARCH_STEPS):
        searching = low < high
        middle = (low + high) // 2
        end = tl.load(out_offsets_ptr + middle + 1, mask=searching, other=0)
        after = searching & (end <= rows)
        low = tl.where(after, middle + 1, low)
        high = tl.where(searching & (end > rows), middle, high)
    inside = (rows < num_rows) & (low < B)
    local = rows - tl.load(out_offsets_ptr + low, mask=inside, other=0)
    count = tl.load(first_count_ptr + low, mask=inside, other=0)
    in_first = inside & (local < count)

    wanted = (cols < D)[None, :]
    value = tl.full((BLOCK_N, BLOCK_D), fill, out_ptr.dtype.element_ty)
    if HAS_FIRST:
        source = tl.load(first_start_ptr + low, mask=in_first, other=0) + local
        mask = (in_first & (source >= 0) & (source < num_first))[:, None] & wanted
        found = tl.load(first_ptr + source[:, None] * stride_first + cols[None, :], mask=mask)
        value = tl.where(mask, found, value)
    if HAS_SECOND:
        in_second = inside & (local >= count)
        source = tl.load(second_start_ptr + low, mask=in_second, other=0) + local - count
        mask = (in_second & (source >= 0) & (source < num_second))[:, None] & wanted
        found = tl.load(second_ptr + source[:, None] * stride_second + cols[None, :], mask=mask)
        value = tl.where(mask, found, value)
    out = out_ptr + rows[:, None] * D + cols[None, :]
    tl.store(out, value, mask=(rows < num_rows)[:, None] & wanted)


def gather(
    plan: Plan, num_rows: int, first: Tensor | None, second: Tensor | None, fill: float = 0.0
) -> Tensor:
    """Return the (num_rows, D) rows of `plan`; sources may have any row stride.

    Offsets that point outside a source give filled rows, never a read outside it.
    """
    source = first if first is not None else second
    assert source is not None
    D = source.shape[1]
    out = source.new_empty(num_rows, D)
    if out.numel() == 0:
        return out
    sources = [x if x is None or x.stride(1) == 1 else x.contiguous() for x in (first, second)]
    B = plan.first_start.numel()
    block_d = min(1024, triton.next_power_of_2(D))
    block_n = max(1, 4096 // max(block_d, 16))
    _gather_kernel[(triton.cdiv(num_rows, block_n), triton.cdiv(D, block_d))](
        *sources,
        out,
        plan.out_offsets,
        plan.first_start.contiguous(),
        plan.first_count.contiguous(),
        plan.second_start.contiguous(),
        num_rows,
        *(0 if x is None else x.shape[0] for x in sources),
        *(0 if x is None else x.stride(0) for x in sources),
        float(fill),
        B,
        D=D,
        SEARCH_STEPS=max(1, B.bit_length()),
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        HAS_FIRST=first is not None,
        HAS_SECOND=second is not None,
        num_warps=4,
    )
    return out
