"""What the kernels need beside q, k and v: who computes what, and zero-padded tails.

A tile copied by the copy engine ends where a block ends, not where a sequence does. The rows
beyond belong to the next sequence, and a NaN or Inf there times a hidden weight of 0 is a NaN. So
the last, part-filled block of each sequence is copied to a buffer of its own, padded with zeros,
from where the kernels read it.

How many blocks a sequence has is known on the GPU alone. A grid of as many programs for each as
the longest needs has mostly programs without work where few sequences are long, as stochastic
length leaves them, and each takes a processor for as long as it takes to start. So there are as
many programs as tokens can need, and a table says where each works.

Letters: B sequences, H heads, P programs.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.launch import launch
from kernels._triton.sizes import cdiv

ROWS = 16
"""Rows that one program copies."""
BLOCKS = {"ROWS": ROWS, "BLOCK_C": 256, "BLOCK_B": 1024}


class Programs(NamedTuple):
    """Blocks of rows to be shared out, each for every head."""

    offsets: Tensor
    """(B + 1,) int64: the rows of each sequence."""
    rows: int
    """Of all sequences."""
    longest: int
    block: int
    heads: int

    @property
    def count(self) -> int:
        """P: at least what the lengths need, which the host does not know."""
        num_sequences = self.offsets.numel() - 1
        at_most = num_sequences * cdiv(self.longest, self.block)
        return self.heads * min(at_most, num_sequences + self.rows // self.block)


class Tails(NamedTuple):
    """Two tensors that share offsets, and the block in which their rows are read."""

    first: Tensor
    second: Tensor | None
    offsets: Tensor
    block: int


@triton.jit
def _copy_tail(
    source_ptr, tail_ptr, stride, start, length, b, row, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Copy rows `row` of a block: those of the sequence's last block, then zeros."""
    first = length // BLOCK * BLOCK
    for c in range(0, COLUMNS, BLOCK_C):
        cols = c + tl.arange(0, BLOCK_C)
        inside = (first + row < length)[:, None] & (cols < COLUMNS)[None, :]
        at = source_ptr + (start + first + row)[:, None] * stride + cols[None, :]
        x = tl.load(at, mask=inside, other=0.0)
        to = tail_ptr + (b * BLOCK + row).to(tl.int64)[:, None] * COLUMNS + cols[None, :]
        tl.store(to, x, mask=(cols < COLUMNS)[None, :])


@triton.jit
def _blocks(offsets_ptr, sequence, inside, BLOCK: tl.constexpr):
    """Return how many blocks these sequences have."""
    begin = tl.load(offsets_ptr + sequence, mask=inside, other=0)
    end = tl.load(offsets_ptr + sequence + 1, mask=inside, other=0)
    return ((end - begin + BLOCK - 1) // BLOCK).to(tl.int32)


@triton.jit(
    do_not_specialize=[
        "num_sequences", "num_programs", "a_stride", "b_stride", "c_stride", "d_stride",
    ]
)  # fmt: skip
def _prepare_kernel(
    offsets_ptr, order_ptr, num_sequences, programs_ptr, rows_ptr, num_programs,
    a_ptr, a_tail_ptr, a_stride, b_ptr, b_tail_ptr, b_stride, ab_offsets_ptr,
    c_ptr, c_tail_ptr, c_stride, d_ptr, d_tail_ptr, d_stride, cd_offsets_ptr,
    AB_BLOCK: tl.constexpr, A_COLUMNS: tl.constexpr, B_COLUMNS: tl.constexpr,
    CD_BLOCK: tl.constexpr, C_COLUMNS: tl.constexpr, D_COLUMNS: tl.constexpr,
    H: tl.constexpr, PLACED_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    if tl.program_id(1) == 0:
        length = tl.load(offsets_ptr + b + 1) - tl.load(offsets_ptr + b)
        rank = 0
        first_program = 0
        for first in range(0, num_sequences, BLOCK_B):
            other = first + tl.arange(0, BLOCK_B)
            inside = other < num_sequences
            begin = tl.load(offsets_ptr + other, mask=inside, other=0)
            lengths = tl.load(offsets_ptr + other + 1, mask=inside, other=0) - begin
            before = (lengths > length) | ((lengths == length) & (other < b))
            rank += tl.sum((before & inside).to(tl.int32), 0)
            if programs_ptr is not None:
                blocks = _blocks(rows_ptr, other, before & inside, PLACED_BLOCK)
                first_program += H * tl.sum(blocks, 0)
        tl.store(order_ptr + rank, b)
        if programs_ptr is not None:
            count = H * _blocks(rows_ptr, b, True, PLACED_BLOCK)
            if rank == num_sequences - 1:
                count = num_programs - first_program  # those left over have a place beyond the end
            for begin in range(0, count, BLOCK_B):
                place = begin + tl.arange(0, BLOCK_B)
                to = programs_ptr + 2 * (first_program + place)
                tl.store(to, tl.zeros_like(place) + b, mask=place < count)
                tl.store(to + 1, place, mask=place < count)
    if a_ptr is not None:
        start = tl.load(ab_offsets_ptr + b)
        length = tl.load(ab_offsets_ptr + b + 1) - start
        if (length % AB_BLOCK != 0) & (tl.program_id(1) * ROWS < AB_BLOCK):
            _copy_tail(
                a_ptr, a_tail_ptr, a_stride, start, length, b, row, AB_BLOCK, A_COLUMNS, BLOCK_C
            )
            if b_ptr is not None:
                _copy_tail(
                    b_ptr, b_tail_ptr, b_stride, start, length, b, row, AB_BLOCK, B_COLUMNS, BLOCK_C
                )
    if c_ptr is not None:
        start = tl.load(cd_offsets_ptr + b)
        length = tl.load(cd_offsets_ptr + b + 1) - start
        if (length % CD_BLOCK != 0) & (tl.program_id(1) * ROWS < CD_BLOCK):
            _copy_tail(
                c_ptr, c_tail_ptr, c_stride, start, length, b, row, CD_BLOCK, C_COLUMNS, BLOCK_C
            )
            if d_ptr is not None:
                _copy_tail(
                    d_ptr, d_tail_ptr, d_stride, start, length, b, row, CD_BLOCK, D_COLUMNS, BLOCK_C
                )


def prepare(
    offsets: Tensor, *tails: Tails, programs: Programs | None = None
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Return the order of the sequences, what programs do, and the padded last blocks. One launch.

    Args:
        offsets: (B + 1,) int64, whose lengths make the order.
        tails: at most two; rows are (rows, H, D) whose last two dims are contiguous.
        programs: to be shared out in that order; None means not.

    Returns:
        (B,) int32, longest first. (P, 2) int32 of each program its sequence and its place among
        those of the sequence: head by head, block by block; places beyond the last mean no work.
        For each tensor of `tails` (B * block, H, D): rows of a sequence that ends where a block
        does are not written.
    """
    num_sequences = offsets.numel() - 1
    order = torch.empty(num_sequences, device=offsets.device, dtype=torch.int32)
    count = 0 if programs is None else programs.count
    placed = torch.empty(count, 2, device=offsets.device, dtype=torch.int32)
    of_programs = None if programs is None else (placed, programs.offsets, count)
    arguments: list[Tensor | int | None] = []
    constants: list[int] = []
    buffers: list[Tensor | None] = []
    for pair in (*tails, *[None] * (2 - len(tails))):
        sources = (None, None) if pair is None else (pair.first, pair.second)
        block = 1 if pair is None else pair.block
        constants.append(block)
        for x in sources:
            tail = None if x is None else x.new_empty(num_sequences * block, *x.shape[1:])
            arguments += [x, tail, 0 if x is None else x.stride(0)]
            constants.append(1 if x is None else x.shape[1] * x.shape[2])
            if pair is not None:
                buffers.append(tail)
        arguments.append(None if pair is None else pair.offsets)
    if num_sequences:
        rows = max((pair.block for pair in tails), default=ROWS)
        names = ("AB_BLOCK", "A_COLUMNS", "B_COLUMNS", "CD_BLOCK", "C_COLUMNS", "D_COLUMNS")
        launch(
            _prepare_kernel,
            (num_sequences, cdiv(rows, ROWS), 1),
            (offsets, order, num_sequences, *(of_programs or (None, None, 0)), *arguments),
            {
                **dict(zip(names, constants, strict=True)),
                "H": 1 if programs is None else programs.heads,
                "PLACED_BLOCK": 1 if programs is None else programs.block,
                **BLOCKS,
            },
        )
    return order, placed, buffers
