"""The mask of kernels/hstu_attention/mask.py on tiles: which blocks to visit, and each pair of one.

A block is visited if any of its pairs may be visible, and computed without a mask if all are.
Blocks to visit are a few runs of block indices, (begin, count); pick2 and pick4 walk through them.

Mask options are compile-time constants. CONTEXT: 0 causal, 1 prefix, 2 prefix_sees_all. WINDOW: -1
for none. history = length - num_candidates.
"""

import triton
import triton.language as tl

from kernels.hstu_attention.mask import AttentionMask


def mask_constants(mask: AttentionMask) -> dict[str, int]:
    """Return the compile-time constants of `mask`."""
    return {
        "NUM_CONTEXT": mask.num_context,
        "CONTEXT": ("causal", "prefix", "prefix_sees_all").index(mask.context),
        "WINDOW": -1 if mask.local_window is None else mask.local_window,
        "GLOBAL_ROWS": mask.global_rows,
        "GLOBAL_COLUMNS": mask.global_columns,
    }


@triton.jit
def visible(
    row,
    col,
    length,
    history,
    NUM_CONTEXT: tl.constexpr,
    CONTEXT: tl.constexpr,
    WINDOW: tl.constexpr,
    GLOBAL_ROWS: tl.constexpr,
    GLOBAL_COLUMNS: tl.constexpr,
):
    """Port of mask.visible; row and col are at least 0 and broadcast."""
    sees = col <= row
    if WINDOW >= 0:
        near = (row - col <= WINDOW) | (col < NUM_CONTEXT + GLOBAL_COLUMNS)
        sees = sees & (near | (row >= history - GLOBAL_ROWS))
    if CONTEXT == 1:
        sees = tl.where(row < NUM_CONTEXT, col < tl.minimum(history, NUM_CONTEXT), sees)
    if CONTEXT == 2:
        sees = tl.where(row < NUM_CONTEXT, col < history, sees)
    candidate_sees = (col < history) | (col == row)
    return (row < length) & (col < length) & tl.where(row < history, sees, candidate_sees)


@triton.jit
def visible_to_rows(
    row,
    col,
    length,
    history,
    NUM_CONTEXT: tl.constexpr,
    CONTEXT: tl.constexpr,
    WINDOW: tl.constexpr,
    GLOBAL_ROWS: tl.constexpr,
    GLOBAL_COLUMNS: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """`visible` with few operations a pair: each row sees an interval of keys, and some more.

    row (M, 1) is at least 0, col (1, N). Without CANDIDATES history is length.
    """
    far: tl.constexpr = NUM_CONTEXT + GLOBAL_COLUMNS
    end = tl.minimum(row + 1, history)
    if CONTEXT == 1:
        end = tl.where(row < tl.minimum(NUM_CONTEXT, history), NUM_CONTEXT, end)
    if CONTEXT == 2:
        end = tl.where(row < NUM_CONTEXT, history, end)
    end = tl.where(row < length, tl.minimum(end, history), 0)
    seen = col < end
    if WINDOW >= 0:
        begin = tl.where(row < history - GLOBAL_ROWS, row - WINDOW, 0)
        if CONTEXT > 0:
            begin = tl.where(row < NUM_CONTEXT, 0, begin)
        near = col >= begin
        if far > 0:
            near = near | (col < far)
        seen = seen & near
    if CANDIDATES:
        itself = tl.where((row >= history) & (row < length), row, -1)
        seen = seen | (col == itself)
    return seen


@triton.jit
def visible_of_columns(
    row,
    col,
    length,
    history,
    NUM_CONTEXT: tl.constexpr,
    CONTEXT: tl.constexpr,
    WINDOW: tl.constexpr,
    GLOBAL_ROWS: tl.constexpr,
    GLOBAL_COLUMNS: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """`visible` with few operations a pair: each key is seen by an interval of rows, and some more.

    row (1, M) is at least 0, col (N, 1). Without CANDIDATES history is length.
    """
    end = length
    if WINDOW >= 0:
        end = tl.minimum(col + WINDOW + 1, length)
        end = tl.where(col < NUM_CONTEXT + GLOBAL_COLUMNS, length, end)
    if CANDIDATES:
        end = tl.where(col < history, end, tl.minimum(col + 1, length))
    seen = (row >= col) & (row < end)
    if WINDOW >= 0 and (GLOBAL_ROWS > 0 or CANDIDATES):
        late = tl.where(col < history, tl.maximum(col, history - GLOBAL_ROWS), length)
        seen = seen | ((row >= late) & (row < length))
    if CONTEXT > 0:
        prefix: tl.constexpr = NUM_CONTEXT
        first_hidden = history
        if CONTEXT == 1:
            first_hidden = tl.minimum(history, prefix)
        seen = seen | (row < tl.where(col < first_hidden, tl.minimum(prefix, history), 0))
    return seen


@triton.jit
def key_blocks(
    row_begin,
    row_end,
    history,
    BLOCK: tl.constexpr,
    NUM_CONTEXT: tl.constexpr,
    CONTEXT: tl.constexpr,
    WINDOW: tl.constexpr,
    GLOBAL_ROWS: tl.constexpr,
    GLOBAL_COLUMNS: tl.constexpr,
):
    """Return the runs of key blocks that the rows row_begin .. row_end - 1 need.

    Returns:
        Two runs of wholly visible blocks, then four of partly visible ones, as (begin, count) each.
    """
    far: tl.constexpr = NUM_CONTEXT + GLOBAL_COLUMNS
    last_local = tl.minimum(row_end, history - GLOBAL_ROWS) - 1  # newest row under the window
    # Keys that some row sees: far columns, near_begin .. near_end, and each candidate itself.
    near_begin = 0
    if WINDOW >= 0 and row_end <= history - GLOBAL_ROWS:
        near_begin = tl.maximum(row_begin - WINDOW, 0)
    near_end = tl.minimum(row_end, history)
    if CONTEXT == 1 and row_begin < NUM_CONTEXT:
        near_end = tl.maximum(near_end, tl.minimum(history, NUM_CONTEXT))
    if CONTEXT == 2 and row_begin < NUM_CONTEXT:
        near_end = history
    near_begin = near_begin // BLOCK
    near_end = tl.cdiv(near_end, BLOCK)
    far_end = tl.minimum((far + BLOCK - 1) // BLOCK, near_begin)
    far_full_end = tl.minimum(far // BLOCK, near_begin)
    self_begin = tl.maximum(tl.maximum(row_begin, history) // BLOCK, near_end)
    self_end = tl.cdiv(tl.where(row_end > history, row_end, 0), BLOCK)
    # Keys that every row sees: up to the oldest row, inside the window of the newest.
    full_begin = near_begin
    if WINDOW >= 0 and row_begin <= last_local:
        full_begin = tl.cdiv(tl.maximum(last_local - WINDOW, 0), BLOCK)
    full_begin = tl.minimum(tl.maximum(full_begin, near_begin), near_end)
    full_end = tl.maximum(tl.minimum(row_begin + 1, history) // BLOCK, full_begin)
    full_end = tl.minimum(full_end, near_end)
    return (
        0,
        far_full_end,
        full_begin,
        full_end - full_begin,
        far_full_end,
        far_end - far_full_end,
        near_begin,
        full_begin - near_begin,
        full_end,
        near_end - full_end,
        self_begin,
        tl.maximum(self_end - self_begin, 0),
    )


@triton.jit
def query_blocks(
    key_begin,
    key_end,
    length,
    history,
    first_row,
    BLOCK: tl.constexpr,
    NUM_CONTEXT: tl.constexpr,
    CONTEXT: tl.constexpr,
    WINDOW: tl.constexpr,
    GLOBAL_ROWS: tl.constexpr,
    GLOBAL_COLUMNS: tl.constexpr,
):
    """Return the runs of query blocks that see keys key_begin .. key_end - 1.

    Query block i holds the rows first_row + i * BLOCK and following, up to length.

    Returns:
        As key_blocks.
    """
    far: tl.constexpr = NUM_CONTEXT + GLOBAL_COLUMNS
    num_blocks = tl.cdiv(length - first_row, BLOCK)
    global_row = tl.maximum(history - GLOBAL_ROWS, key_begin)
    # Rows that see some key: local_begin .. local_end, global rows with the candidates, and prefix
    # rows, which alone see keys that follow.
    local_begin = tl.maximum(key_begin - first_row, 0) // BLOCK
    local_end = num_blocks
    if WINDOW >= 0 and key_begin >= far:
        last = tl.minimum(tl.minimum(key_end, history) + WINDOW, length)
        local_end = tl.cdiv(tl.maximum(last - first_row, 0), BLOCK)
    prefix_end = 0
    if CONTEXT == 1 and key_begin < NUM_CONTEXT:
        prefix_end = NUM_CONTEXT
    if CONTEXT == 2:
        prefix_end = NUM_CONTEXT
    prefix_end = tl.cdiv(tl.maximum(tl.minimum(prefix_end, length) - first_row, 0), BLOCK)
    global_begin = tl.maximum(tl.maximum(global_row - first_row, 0) // BLOCK, local_end)
    if key_begin >= history:  # candidates: each sees itself
        prefix_end = 0
        local_end = tl.cdiv(tl.maximum(key_end - first_row, 0), BLOCK)
        global_begin = num_blocks
    local_begin = tl.minimum(local_begin, local_end)
    prefix_end = tl.minimum(prefix_end, local_begin)
    # Rows that see every key: from the newest key on; local ones while the oldest is in the window.
    full_begin = tl.cdiv(tl.maximum(key_end - 1 - first_row, 0), BLOCK)
    full_end = local_end
    if WINDOW >= 0 and key_end > far:
        full_end = tl.maximum(key_begin + WINDOW + 1 - first_row, 0) // BLOCK
    global_full = tl.cdiv(tl.maximum(tl.maximum(global_row, key_end - 1) - first_row, 0), BLOCK)
    if key_end > history:
        full_end = 0
        global_full = num_blocks
    full_begin = tl.minimum(tl.maximum(full_begin, local_begin), local_end)
    full_end = tl.minimum(tl.maximum(full_end, full_begin), local_end)
    global_full = tl.minimum(tl.maximum(global_full, global_begin), num_blocks)
    return (
        full_begin,
        full_end - full_begin,
        global_full,
        num_blocks - global_full,
        0,
        prefix_end,
        local_begin,
        full_begin - local_begin,
        full_end,
        local_end - full_end,
        global_begin,
        global_full - global_begin,
    )


@triton.jit
def pick2(i, begin0, count0, begin1):
    """Return the i-th block of two runs."""
    return tl.where(i < count0, begin0 + i, begin1 + i - count0)


@triton.jit
def pick4(i, begin0, count0, begin1, count1, begin2, count2, begin3):
    """Return the i-th block of four runs."""
    left = i - count0 - count1
    late = pick2(left, begin2, count2, begin3)
    return tl.where(left < 0, pick2(i, begin0, count0, begin1), late)
