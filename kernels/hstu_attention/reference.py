"""Eager attention over jagged sequences, through a padded dense form. The oracle of the kernels.

Letters: B sequences, L tokens, R queries, N longest sequence, M most queries of a sequence,
H heads, K dim of queries and keys, V dim of values.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.hstu_attention.bias import RelativeBias, position_index, time_bucket
from kernels.hstu_attention.mask import AttentionMask, visible


def hstu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    max_len: int,
    alpha: float,
    scaling_length: float | None,
    activation: str,
    mask: AttentionMask,
    num_candidates: Tensor,
    q_offsets: Tensor,
    max_q_len: int,
    bias: RelativeBias | None,
) -> Tensor:
    """Return (R, H, V): the attention of `kernels.hstu_attention`, whose arguments these are.

    Differentiable; computes in float32, or in float64 where q is float64.
    """
    compute = torch.promote_types(q.dtype, torch.float32)
    lengths, q_lengths = offsets.diff(), q_offsets.diff()
    q_slot_R = _slots(q_offsets, q.shape[0], max_q_len)
    k_slot_L = _slots(offsets, k.shape[0], max_len)

    row_BM1 = ((lengths - q_lengths)[:, None] + torch.arange(max_q_len, device=q.device)).unsqueeze(
        -1
    )
    col_11N = torch.arange(max_len, device=q.device).view(1, 1, -1)
    length_B11, candidates_B11 = lengths.view(-1, 1, 1), num_candidates.view(-1, 1, 1)
    hidden_B1MN = ~visible(row_BM1, col_11N, length_B11, candidates_B11, mask).unsqueeze(1)

    q_BHMK = _pad(q.to(compute) * alpha, q_slot_R, lengths.numel(), max_q_len)
    k_BHNK = _pad(k.to(compute), k_slot_L, lengths.numel(), max_len)
    v_BHNV = _pad(v.to(compute), k_slot_L, lengths.numel(), max_len)
    score_BHMN = q_BHMK @ k_BHNK.transpose(-1, -2)
    if bias is not None:
        history_B11 = length_B11 - candidates_B11
        index_BMN = position_index(row_BM1, col_11N, history_B11, bias.position_table.numel())
        bias_BMN = _gather(bias.position_table.to(compute), index_BMN)
        if bias.time_table is not None:
            assert bias.query_time is not None
            assert bias.key_time is not None
            query_BM1 = _scatter(bias.query_time, q_slot_R, lengths.numel(), max_q_len)[..., None]
            key_B1N = _scatter(bias.key_time, k_slot_L, lengths.numel(), max_len)[:, None]
            bucket_BMN = time_bucket(query_BM1, key_B1N, bias.time_table.numel() - 1)
            bias_BMN = bias_BMN + _gather(bias.time_table.to(compute), bucket_BMN)
        score_BHMN = score_BHMN + bias_BMN.unsqueeze(1)

    if activation == "silu":
        # Masked after the activation: silu(-inf) would be NaN.
        weight_BHMN = torch.nn.functional.silu(score_BHMN).masked_fill(hidden_B1MN, 0.0)
        assert scaling_length is not None
        out_BHMV = weight_BHMN @ v_BHNV / scaling_length
    else:
        # Slots past the end of a sequence see nothing; the softmax of all -inf would be NaN.
        score_BHMN = score_BHMN.masked_fill(hidden_B1MN, torch.finfo(compute).min)
        weight_BHMN = score_BHMN.softmax(dim=-1).masked_fill(hidden_B1MN, 0.0)
        out_BHMV = weight_BHMN @ v_BHNV
    return _unpad(out_BHMV, q_slot_R).to(q.dtype)


def _slots(offsets: Tensor, num_tokens: int, max_len: int) -> Tensor:
    """Return (L,) int64: where each token stands in a (B * max_len) dense layout."""
    start = torch.arange(offsets.numel() - 1, device=offsets.device) * max_len - offsets[:-1]
    shift = torch.repeat_interleave(start, offsets.diff(), output_size=num_tokens)
    return shift + torch.arange(num_tokens, device=offsets.device)


def _scatter(x: Tensor, slot_L: Tensor, num_sequences: int, max_len: int) -> Tensor:
    """Return (B, N, ...): rows of x (L, ...) at their slots, zero elsewhere."""
    dense = x.new_zeros(num_sequences * max_len, *x.shape[1:])
    return dense.index_copy(0, slot_L, x).view(num_sequences, max_len, *x.shape[1:])


def _pad(x_LHK: Tensor, slot_L: Tensor, num_sequences: int, max_len: int) -> Tensor:
    """Return (B, H, N, K)."""
    return _scatter(x_LHK, slot_L, num_sequences, max_len).transpose(1, 2)


def _unpad(x_BHNK: Tensor, slot_L: Tensor) -> Tensor:
    """Return (L, H, K): the inverse of _pad."""
    dense = x_BHNK.transpose(1, 2).flatten(0, 1)
    return _Take.apply(dense, slot_L)  # type: ignore[no-any-return, no-untyped-call]


class _Take(torch.autograd.Function):
    """x[slot] for slots that differ: its gradient needs no sum, which is slow on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(slot)
        ctx.num_rows = x.shape[0]
        return x.index_select(0, slot)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (slot,) = ctx.saved_tensors
        return grad.new_zeros(ctx.num_rows, *grad.shape[1:]).index_copy(0, slot, grad), None


def _gather(table: Tensor, index: Tensor) -> Tensor:
    """Return table[index] by index_select, whose gradient is a serial sum, ordered, on a CPU."""
    return table.index_select(0, index.flatten()).view(index.shape)
