"""Sampled softmax in eager PyTorch, group by group; computes in float32, or in float64."""

import torch
from torch import Tensor


def sampled_softmax(
    query_RD: Tensor,
    positive_RD: Tensor,
    negative_ND: Tensor,
    query_offsets: Tensor,
    negative_offsets: Tensor,
    positive_id_R: Tensor,
    negative_id_N: Tensor,
    positive_log_q_R: Tensor | None,
    negative_log_q_N: Tensor | None,
    temperature: float,
) -> Tensor:
    """Return (R,) losses, in float32 (float64 for float64)."""
    compute = torch.promote_types(query_RD.dtype, torch.float32)
    query, positive, negative = (x.to(compute) for x in (query_RD, positive_RD, negative_ND))
    logit_R = (query * positive).sum(1) / temperature
    if positive_log_q_R is not None:
        logit_R = logit_R - positive_log_q_R.to(compute)
    rows, columns = query_offsets.tolist(), negative_offsets.tolist()
    losses = [logit_R[:0] + 0 * negative[:0].sum()]
    for group in range(len(rows) - 1):
        r = slice(rows[group], rows[group + 1])
        n = slice(columns[group], columns[group + 1])
        logit_rn = query[r] @ negative[n].T / temperature
        if negative_log_q_N is not None:
            logit_rn = logit_rn - negative_log_q_N[n].to(compute)
        same = positive_id_R[r, None] == negative_id_N[None, n]
        logit_rn = logit_rn.masked_fill(same, -torch.inf)
        logits = torch.cat([logit_R[r, None], logit_rn], 1)
        losses.append(logits.logsumexp(1) - logit_R[r])
    return torch.cat(losses)
