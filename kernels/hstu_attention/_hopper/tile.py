"""What the kernels share: where a program works, which blocks it visits, SiLU."""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from kernels.hstu_attention._triton.mask import key_blocks, pick2, pick4, query_blocks


@gluon.jit
def sequence(
    num_blocks, order_ptr, offsets_ptr, q_offsets_ptr, num_candidates_ptr,
    H: gl.constexpr, BLOCK: gl.constexpr, OF_QUERIES: gl.constexpr, PLACED: gl.constexpr,
    BY_BLOCK: gl.constexpr,
):  # fmt: skip
    """Return the first row of this program's block, its head and sequence b, and b's extent.

    That is the first key, tokens, history, first query, queries; all int32. Without work the first
    row is not below the number of rows. Blocks of queries are taken from the last, which sees most,
    blocks of keys from the first, which most see. Programs of one head are neighbours, so that they
    share its keys in the cache. With BY_BLOCK those of one block are: where few blocks have nearly
    all the work, none of them must start last.

    PLACED: `order_ptr` is what prepare.py makes for `Programs`, and `num_blocks` is not read. Else
    it holds the order of the sequences, and each has `num_blocks` programs a head, those beyond its
    end without work.
    """
    pid = gl.program_id(0)
    place = 0
    if PLACED:
        b = gl.load(order_ptr + 2 * pid)
        place = gl.load(order_ptr + 2 * pid + 1)
    else:
        heads = gl.num_programs(0) // num_blocks
        block = pid % num_blocks
        sequence_head = pid // num_blocks
        if BY_BLOCK:
            block = pid // heads
            sequence_head = pid % heads
        head = sequence_head % H
        b = gl.load(order_ptr + sequence_head // H)
    key_start = gl.load(offsets_ptr + b).to(gl.int32)
    length = gl.load(offsets_ptr + b + 1).to(gl.int32) - key_start
    q_start = gl.load(q_offsets_ptr + b).to(gl.int32)
    q_len = gl.load(q_offsets_ptr + b + 1).to(gl.int32) - q_start
    history = length
    if num_candidates_ptr is not None:
        history = length - gl.load(num_candidates_ptr + b).to(gl.int32)
    rows = length
    if OF_QUERIES:
        rows = q_len
    if PLACED:
        num_blocks = gl.maximum((rows + BLOCK - 1) // BLOCK, 1)
        head = gl.minimum(place // num_blocks, H - 1)
        block = place % num_blocks
    if OF_QUERIES:
        block = num_blocks - 1 - block
    first = block * BLOCK
    if PLACED:
        first = gl.where(place < num_blocks * H, first, rows)
    return first, head, b, key_start, length, history, q_start, q_len


@gluon.jit
def visited_keys(
    row_begin, row_end, history, BLOCK: gl.constexpr,
    NUM_CONTEXT: gl.constexpr, CONTEXT: gl.constexpr, WINDOW: gl.constexpr,
    GLOBAL_ROWS: gl.constexpr, GLOBAL_COLUMNS: gl.constexpr,
):  # fmt: skip
    """Return the numbers of partly and of wholly visible key blocks, and what `nth_block` takes."""
    full0, n0, full1, n1, part0, m0, part1, m1, part2, m2, part3, m3 = key_blocks(
        row_begin, row_end, history, BLOCK,
        NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS,
    )  # fmt: skip
    return m0 + m1 + m2 + m3, n0 + n1, full0, n0, full1, part0, m0, part1, m1, part2, m2, part3


@gluon.jit
def visiting_queries(
    key_begin, key_end, length, history, first_row, BLOCK: gl.constexpr,
    NUM_CONTEXT: gl.constexpr, CONTEXT: gl.constexpr, WINDOW: gl.constexpr,
    GLOBAL_ROWS: gl.constexpr, GLOBAL_COLUMNS: gl.constexpr,
):  # fmt: skip
    """Return the numbers of query blocks that see a part, and all of a key block, and so on."""
    full0, n0, full1, n1, part0, m0, part1, m1, part2, m2, part3, m3 = query_blocks(
        key_begin, key_end, length, history, first_row, BLOCK,
        NUM_CONTEXT, CONTEXT, WINDOW, GLOBAL_ROWS, GLOBAL_COLUMNS,
    )  # fmt: skip
    return m0 + m1 + m2 + m3, n0 + n1, full0, n0, full1, part0, m0, part1, m1, part2, m2, part3


@gluon.jit
def part_block(i, part0, m0, part1, m1, part2, m2, part3):
    """Return the i-th partly visible block."""
    return pick4(i, part0, m0, part1, m1, part2, m2, part3)


@gluon.jit
def full_block(i, full0, n0, full1):
    """Return the i-th wholly visible block."""
    return pick2(i, full0, n0, full1)


@gluon.jit
def tanh(x):
    """Hyperbolic tangent by the special-function unit: relative error 2^-11, below bf16's."""
    return gl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def multiply(x, y):
    """Return x * y, rounded: what is added to it afterwards is not made one operation with it.

    That would keep both factors in registers for as long as the product is wanted.
    """
    return gl.inline_asm_elementwise(
        "mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def half_score(product, half_alpha, bias, HAS_BIAS: gl.constexpr):
    """Return (alpha * q k + bias) / 2, the argument of tanh in SiLU; `bias` is halved already."""
    if HAS_BIAS:
        return gl.fma(product, half_alpha, bias)
    return product * half_alpha


@gluon.jit
def store_rows(base, x, start, first, num_rows, stride, column):
    """Write x to rows first .. of a sequence of `num_rows`, nothing beyond."""
    rows = first + gl.arange(0, x.shape[0], gl.SliceLayout(1, x.type.layout))
    cols = column + gl.arange(0, x.shape[1], gl.SliceLayout(0, x.type.layout))
    at = (start + rows).to(gl.int64)[:, None] * stride + cols[None, :]
    gl.store(base + at, x, mask=(rows < num_rows)[:, None])
