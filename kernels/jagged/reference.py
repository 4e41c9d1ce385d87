"""Rows of a jagged result in eager PyTorch, differentiable in both sources."""

import torch
from torch import Tensor

from kernels.jagged.plan import Plan


def gather(
    plan: Plan, num_rows: int, first_ND: Tensor | None, second_ND: Tensor | None, fill: float = 0.0
) -> Tensor:
    """Return the (num_rows, D) rows of `plan`; rows after its last sequence are filled."""
    source = first_ND if first_ND is not None else second_ND
    assert source is not None
    row = torch.arange(num_rows, device=source.device)
    sequence = torch.searchsorted(plan.out_offsets[1:], row, right=True)
    inside = sequence < plan.first_start.numel()
    out = source.new_full((num_rows, source.shape[1]), fill)
    if num_rows == 0 or plan.first_start.numel() == 0:
        return torch.cat([out, source[:0]])
    sequence = sequence.clamp(max=plan.first_start.numel() - 1)
    row = row - plan.out_offsets[sequence]
    in_first = row < plan.first_count[sequence]
    starts = (
        (first_ND, in_first, plan.first_start[sequence]),
        (second_ND, ~in_first, plan.second_start[sequence] - plan.first_count[sequence]),
    )
    for values, chosen, start in starts:
        if values is not None:
            to = (inside & chosen).nonzero().squeeze(1)
            out = out.index_copy(0, to, values.index_select(0, (start + row)[to]))
    return out
