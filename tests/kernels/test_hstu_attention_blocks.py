"""Which blocks the kernels visit, and their time buckets, against brute force."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.hstu_attention import AttentionMask
from kernels.hstu_attention._triton.mask import (
    key_blocks,
    mask_constants,
    pick4,
    query_blocks,
    visible_of_columns,
    visible_to_rows,
)
from kernels.hstu_attention._triton.tile import time_bucket
from kernels.hstu_attention.bias import time_bucket as time_bucket_of
from kernels.hstu_attention.bias import time_thresholds
from kernels.hstu_attention.mask import visible

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit(do_not_specialize=["begin", "end", "length", "history", "first_row"])
def _runs_kernel(
    runs_ptr, begin, end, length, history, first_row, OF_KEYS: tl.constexpr, BLOCK: tl.constexpr,
    NUM_CONTEXT: tl.constexpr, CONTEXT: tl.constexpr, WINDOW: tl.constexpr,
    GLOBAL_ROWS: tl.constexpr, GLOBAL_COLUMNS: tl.constexpr,
):  # fmt: skip
    if OF_KEYS:
        runs = key_blocks(
            begin, end, history, BLOCK,
            NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS,
        )  # fmt: skip
    else:
        runs = query_blocks(
            begin, end, length, history, first_row, BLOCK,
            NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS,
        )  # fmt: skip
    for i in tl.static_range(12):
        tl.store(runs_ptr + i, runs[i])


def blocks_of(mask, **arguments):
    """Return the blocks computed without a mask, and those with."""
    runs = torch.full((12,), -1, dtype=torch.int32, device=DEVICE)
    _runs_kernel[(1,)](runs, **arguments, **mask_constants(mask))
    pairs = runs.view(6, 2).tolist()
    assert all(count >= 0 for _, count in pairs), pairs
    full, part = (
        [b for begin, count in runs for b in range(begin, begin + count)]
        for runs in (pairs[:2], pairs[2:])
    )
    return full, part


def check_blocks(seen, full, part, block, past_end):
    """`seen` (rows of the program, rows to visit): True where a pair is visible.

    past_end: whether a pair past the end of the rows to visit may be computed without a mask.
    """
    visited = full + part
    assert len(set(visited)) == len(visited), "a block is visited twice"

    def by_block(value):
        padded = torch.nn.functional.pad(seen, (0, -seen.shape[1] % block), value=value)
        return padded.unflatten(1, (-1, block))

    needed = by_block(False).any(0).any(1).nonzero().flatten().tolist()
    assert set(needed) <= set(visited), "a visible pair is left out"
    hidden = [b for b in full if not by_block(past_end)[:, b].all()]
    assert not hidden, "a block with hidden pairs is computed without a mask"


masks = st.builds(
    lambda context, num, window, rows, columns: AttentionMask(
        num_context=num,
        context=context if num else "causal",
        local_window=window,
        global_rows=rows if window is not None else 0,
        global_columns=columns if window is not None else 0,
    ),
    context=st.sampled_from(["causal", "prefix", "prefix_sees_all"]),
    num=st.integers(0, 20),
    window=st.none() | st.integers(0, 40),
    rows=st.integers(0, 30),
    columns=st.integers(0, 20),
)
sizes = st.tuples(st.integers(1, 70), st.floats(0, 1), st.floats(0, 1))


def structure(size, mask):
    length, share, q_share = size
    candidates = int(share * length)
    row, col = torch.arange(length)[:, None], torch.arange(length)[None]
    seen = visible(row, col, torch.tensor(length), torch.tensor(candidates), mask)
    return length, length - candidates, int(q_share * length), seen


# A GPU compiles each mask anew: there, the kernels' own tests have to do.
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="for the interpreter")


@interpreted
@pytest.mark.interpret
@settings(max_examples=60, deadline=None)
@given(size=sizes, mask=masks, rows=st.sampled_from([4, 8, 16]), block=st.sampled_from([4, 8]))
def test_key_blocks(size, mask, rows, block):
    length, history, first, seen = structure(size, mask)
    for begin in range(first, length, rows):
        end = min(begin + rows, length)
        full, part = blocks_of(
            mask, begin=begin, end=end, length=length, history=history, first_row=0,
            OF_KEYS=True, BLOCK=block,
        )  # fmt: skip
        check_blocks(seen[begin:end], full, part, block, past_end=False)


@interpreted
@pytest.mark.interpret
@settings(max_examples=60, deadline=None)
@given(size=sizes, mask=masks, keys=st.sampled_from([4, 8, 16]), block=st.sampled_from([4, 8]))
def test_query_blocks(size, mask, keys, block):
    length, history, first, seen = structure(size, mask)
    for begin in range(0, length, keys):
        end = min(begin + keys, length)
        full, part = blocks_of(
            mask, begin=begin, end=end, length=length, history=history, first_row=first,
            OF_KEYS=False, BLOCK=block,
        )  # fmt: skip
        # Rows past the last query are zero, and add nothing.
        check_blocks(seen[first:, begin:end].T, full, part, block, past_end=True)


@triton.jit(do_not_specialize=["length", "history"])
def _visible_kernel(
    by_row_ptr, by_column_ptr, length, history, N: tl.constexpr,
    NUM_CONTEXT: tl.constexpr, CONTEXT: tl.constexpr, WINDOW: tl.constexpr,
    GLOBAL_ROWS: tl.constexpr, GLOBAL_COLUMNS: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, N)
    by_row = visible_to_rows(
        i[:, None], i[None, :], length, history,
        NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS, CANDIDATES,
    )  # fmt: skip
    by_column = visible_of_columns(
        i[None, :], i[:, None], length, history,
        NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS, CANDIDATES,
    )  # fmt: skip
    at = i[:, None] * N + i[None, :]
    tl.store(by_row_ptr + at, by_row)
    tl.store(by_column_ptr + at, tl.trans(by_column))


@interpreted
@pytest.mark.interpret
@settings(max_examples=30, deadline=None)
@given(size=sizes, mask=masks)
def test_intervals_of_visible_pairs(size, mask):
    """Also of rows and columns past the end."""
    length, history, _, seen = structure(size, mask)
    by_row, by_column = (torch.zeros(128, 128, dtype=torch.bool, device=DEVICE) for _ in range(2))
    _visible_kernel[(1,)](
        by_row, by_column, length, history, 128, **mask_constants(mask),
        CANDIDATES=history < length,
    )  # fmt: skip
    expected = torch.zeros(128, 128, dtype=torch.bool)
    expected[:length, :length] = seen
    assert torch.equal(by_row.cpu(), expected)
    assert torch.equal(by_column.cpu(), expected)


@interpreted
@pytest.mark.interpret
def test_a_narrow_window_visits_few_blocks():
    """Work under a window does not grow with the sequence."""
    mask = AttentionMask(local_window=32, global_rows=32, global_columns=8)
    counts = []
    for length in (512, 1024):
        arguments = {"length": length, "history": length, "first_row": 0, "BLOCK": 16}
        full, part = blocks_of(mask, begin=400, end=416, OF_KEYS=True, **arguments)
        columns = blocks_of(mask, begin=256, end=272, OF_KEYS=False, **arguments)
        counts.append((len(full) + len(part), sum(len(x) for x in columns)))
    # Keys: the window and the columns. Queries: the window and the global rows.
    assert counts[0] == counts[1]
    assert counts[0][0] <= 2 + 1 + 1 + 1
    assert counts[0][1] <= 2 + 1 + 1 + 2


@triton.jit
def _bucket_kernel(gap_ptr, threshold_ptr, out_ptr, NUM_BUCKETS: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, time_bucket(tl.load(gap_ptr + i), threshold_ptr, NUM_BUCKETS))


@pytest.mark.interpret
@pytest.mark.parametrize("num_buckets", [0, 7, 128, 150])
def test_time_buckets_are_exact(num_buckets):
    beside = torch.tensor([[t - 1, t] for t in time_thresholds(145)]).flatten()
    rest = torch.randint(0, 2**40, (512 - beside.numel(),)) % 10 ** torch.randint(1, 12, (1,))
    gap = torch.cat([beside, rest]).clamp(0, 2**62).to(DEVICE)
    thresholds = torch.tensor(time_thresholds(num_buckets) or [0], device=DEVICE)
    got = torch.empty(512, dtype=torch.int32, device=DEVICE)
    _bucket_kernel[(1,)](gap, thresholds, got, num_buckets, 512)
    zero = torch.zeros((), dtype=torch.int64, device=DEVICE)
    assert torch.equal(got.long(), time_bucket_of(gap, zero, num_buckets))


@triton.jit
def _pick_kernel(out_ptr, N: tl.constexpr):
    for i in range(N):
        tl.store(out_ptr + i, pick4(i, 3, 2, 10, 0, 20, 3, 40))


@pytest.mark.interpret
def test_pick_walks_through_the_runs():
    got = torch.empty(7, dtype=torch.int32, device=DEVICE)
    _pick_kernel[(1,)](got, 7)
    assert got.tolist() == [3, 4, 20, 21, 22, 40, 41]
