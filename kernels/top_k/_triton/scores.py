"""Scores of a group of items, and what orders them.

Letters: Q queries, E items, D width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP = 64
"""Consecutive items of which the largest score is kept."""


@triton.jit
def group_scores(
    q,
    x_ptr,
    is_item_ptr,
    tile,
    E,
    D,
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """Return (BLOCK_Q, GROUP) float32 scores of a group; -inf where there is no item."""
    rows = tl.arange(0, GROUP).to(tl.int64) + tile * GROUP
    cols = tl.arange(0, BLOCK_D)
    x = tl.load(
        x_ptr + rows[:, None] * D + cols[None, :],
        mask=(rows < E)[:, None] & (cols < D)[None, :],
        other=0.0,
    )
    # Of fp16 and bf16 the precision of fp32 inputs says nothing.
    score = tl.dot(q, tl.trans(x), input_precision="ieee")
    valid = rows < E
    if HAS_MASK:
        valid = valid & (tl.load(is_item_ptr + rows, mask=valid, other=0) != 0)
    # + 0.0 turns -0.0 into 0.0, which equals it.
    return tl.where(valid[None, :], score + 0.0, float("-inf"))


@triton.jit
def queries(q_ptr, first, Q, D, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = first + tl.arange(0, BLOCK_Q)
    cols = tl.arange(0, BLOCK_D)
    mask = (rows < Q)[:, None] & (cols < D)[None, :]
    return tl.load(q_ptr + rows[:, None] * D + cols[None, :], mask=mask, other=0.0)


@triton.jit
def keys(score, index):
    """Return int64 keys that are ordered as (score, then smaller index)."""
    bits = score.to(tl.int32, bitcast=True)
    # Floating numbers as integers that are ordered alike.
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    return (ordered << 32) + (0xFFFFFFFF - index)


def scores_and_indices(key_Qk: Tensor) -> tuple[Tensor, Tensor]:
    """Return what keys were made of."""
    index_Qk = 0xFFFFFFFF - (key_Qk & 0xFFFFFFFF)
    high = (key_Qk >> 32).to(torch.int32)
    return torch.where(high < 0, high ^ 0x7FFFFFFF, high).view(torch.float32), index_Qk


def found(score_Qn: Tensor, row_Qn: Tensor) -> tuple[Tensor, Tensor]:
    """Return scores and rows, -1 where nothing was found."""
    return score_Qn, row_Qn.masked_fill(score_Qn == -torch.inf, -1)
