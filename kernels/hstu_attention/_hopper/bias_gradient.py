"""Gradients of the bias tables in the backward kernel: dS of a tile, summed by distance and bucket.

Both are added to buffers in global memory, in float32 and in no fixed order: where the same bits
are wanted, _triton/bias_gradient.py sums in a pass of its own.
"""

from typing import NamedTuple

import torch
import triton
import triton.experimental.gluon.language as gl
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon

from kernels._triton.launch import launch
from kernels._triton.sizes import cdiv
from kernels.hstu_attention._hopper.bias import BEYOND, apart, load_columns
from kernels.hstu_attention.structure import Structure

REPLICAS = gl.constexpr(64)
"""Of the sums by bucket: far tiles have the same one, and sums to one address wait for each other.
"""


@gluon.constexpr_function
def _diagonal_sums():
    """Return PTX that adds the diagonals of what a warp holds of a (64, 64) tile to memory.

    A lane 4 r + c holds rows r and r + 8 (of 16) at columns 8 g + 2 c and 8 g + 2 c + 1: distances
    8 (g - i) + (2 c + e - r) of its elements (g, i, e) from that of rows and columns 0. It first
    adds those of one coarse = g - i. Then lanes fold: the odd column onto the even one, odd c onto
    even c, c = 2 onto c = 0; an element `shift` columns to the right is on the diagonal of the one
    `shift` rows above, which for the first rows is one coarse back. Lanes c = 0 are left with
    8 coarse - r. Operands: 32 results (none is set), 32 elements in the order e, i, g, addresses,
    of which that of the first element counts.
    """
    coarse = range(-1, 9)
    lines = [
        "{",
        ".reg .pred early, leader;",
        ".reg .b32 lane, source;",
        ".reg .f32 sent, keep<10>, send<10>;",
        "mov.u32 lane, %laneid;",
    ]
    for m in coarse:
        for name, e in (("keep", 0), ("send", 1)):
            terms = [f"${32 + 4 * (m + i) + 2 * i + e}" for i in range(2) if 0 <= m + i < 8] + [
                "0f00000000"
            ] * 2
            lines.append(f"add.f32 {name}{m + 1}, {terms[0]}, {terms[1]};")
    for shift in (1, 2, 4):
        lines.append(f"add.u32 source, lane, {4 * shift + shift // 2};")
        lines.append("and.b32 source, source, 31;")
        lines.append(f"setp.lt.u32 early, lane, {4 * shift};")
        for m in reversed(coarse):
            before = f"send{m}" if m >= 0 else "0f00000000"
            lines.append(f"selp.f32 sent, {before}, send{m + 1}, early;")
            lines.append("shfl.sync.idx.b32 sent, sent, source, 31, -1;")
            lines.append(f"add.f32 keep{m + 1}, keep{m + 1}, sent;")
        if shift < 4:
            lines += [f"mov.f32 send{m + 1}, keep{m + 1};" for m in coarse]
    lines.append("and.b32 lane, lane, 3;")
    lines.append("setp.eq.u32 leader, lane, 0;")
    for m in coarse:
        lines.append(f"@leader red.relaxed.gpu.global.add.f32 [$64 + {32 * m}], keep{m + 1};")
    return "\n".join([*lines, "}"])


_OPERANDS = gl.constexpr(",".join(["=f"] * 32 + ["f"] * 32 + ["l"] * 32))


@gluon.jit
def _warp_sums(x):
    """Return (4,), the sum of the rows of each warp: no warp waits for another."""
    by_row = gl.sum(x, 1)
    return gl.sum(gl.reshape(by_row, [4, 16]), 1)


@gluon.jit
def _add_diagonals(position_grad_ptr, dscore, row, col):
    address = position_grad_ptr + (col[None, :] - row[:, None])
    gl.inline_asm_elementwise(
        _diagonal_sums(), _OPERANDS, [dscore, address.to(gl.int64)],
        dtype=gl.float32, is_pure=False, pack=32,
    )  # fmt: skip


@gluon.jit
def add_bias_grad(
    dscore, position_grad_ptr, time_grad_ptr, row_first, row, col_first, col, history,
    row_time, col_time_ptr, low, high, threshold_ptr, CANDIDATES: gl.constexpr,
):  # fmt: skip
    """Add dS of a tile, (64 keys, 64 queries) float32, by distance and by bucket."""
    if time_grad_ptr is not None:
        left = _warp_sums(dscore)
        if low < high:
            col_time = load_columns(col_time_ptr, col, 1)
            for bucket in range(low, high):
                is_above = apart(row_time, col_time, gl.load(threshold_ptr + bucket))
                above = _warp_sums(gl.where(is_above, dscore, 0.0))
                _add(time_grad_ptr + bucket, left - above)
                left = above
        _add(time_grad_ptr + high, left)
    if CANDIDATES:  # noqa: SIM102 (known at compile time, the other is not)
        if gl.maximum(row_first, col_first) + 63 >= history:  # candidates stand at its end
            moved = (col[None, :] >= history) & (row[:, None] < history)
            by_key = gl.sum(gl.where(moved, dscore, 0.0), 1)
            at = position_grad_ptr + (history - row)
            gl.atomic_add(at, by_key, mask=row < history, sem="relaxed")
            dscore = gl.where(moved, 0.0, dscore)
    _add_diagonals(position_grad_ptr, dscore, row, col)


@gluon.jit
def _add(ptr, x):
    """Add each element of x to the number at ptr."""
    gl.atomic_add(ptr + gl.arange(0, 4, x.type.layout) * 0, x, sem="relaxed")


class BiasGradients(NamedTuple):
    """Sums over dS / (scale / 2), None where there is no such table or it needs no gradient."""

    position: Tensor | None = None
    """float32; begins at distance 0, which others precede."""
    time: Tensor | None = None
    """(REPLICAS, T + 1) float32."""


def bias_gradients(structure: Structure) -> BiasGradients:
    """Return zeros, for the kernel to add to."""
    assert structure.position_table is not None
    device, farthest = structure.offsets.device, structure.max_len + BEYOND
    position = torch.zeros(2 * farthest + 1, device=device)[farthest:]
    if structure.time_table is None:
        return BiasGradients(position)
    return BiasGradients(
        position, torch.zeros(REPLICAS.value, structure.time_table.numel(), device=device)
    )


@triton.jit(do_not_specialize=["reach", "farthest", "num_times"])
def _finish_kernel(
    position_ptr, time_ptr, dposition_ptr, dtime_ptr, reach, farthest, num_times, scale,
    REPLICAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradients of entries: the first and the last also have all that is farther off."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    distance = entry - reach
    value = tl.load(position_ptr + distance, mask=tl.abs(distance) <= farthest, other=0.0)
    if (tl.program_id(0) == 0) | (tl.program_id(0) == 2 * reach // BLOCK):
        for first in range(reach + 1, farthest + 1, BLOCK):
            far = first + tl.arange(0, BLOCK)
            before = tl.sum(tl.load(position_ptr - far, mask=far <= farthest, other=0.0))
            after = tl.sum(tl.load(position_ptr + far, mask=far <= farthest, other=0.0))
            value += tl.where(distance == -reach, before, 0.0)
            value += tl.where(distance == reach, after, 0.0)
    tl.store(dposition_ptr + entry, value * scale, mask=entry <= 2 * reach)
    if time_ptr is not None:
        total = tl.zeros([BLOCK], tl.float32)
        for replica in range(REPLICAS):
            at = time_ptr + replica * num_times + entry
            total += tl.load(at, mask=entry < num_times, other=0.0)
        tl.store(dtime_ptr + entry, total * scale, mask=entry < num_times)


def table_gradients(sums: BiasGradients, structure: Structure) -> tuple[Tensor, Tensor]:
    """Return the gradients of the position table and of the time table (empty without one)."""
    position, time = structure.position_table, structure.time_table
    assert position is not None
    dposition = torch.empty_like(position)
    dtime = position.new_empty(0) if time is None else torch.empty_like(time)
    block = 256
    grid = (cdiv(max(position.numel(), dtime.numel()), block), 1, 1)
    arguments = (
        sums.position, sums.time, dposition, dtime, position.numel() // 2,
        structure.max_len + BEYOND, dtime.numel(), 0.5 * structure.scale,
    )  # fmt: skip
    launch(_finish_kernel, grid, arguments, {"REPLICAS": REPLICAS.value, "BLOCK": block})
    return dposition, dtime
