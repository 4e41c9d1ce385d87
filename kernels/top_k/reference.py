"""Exact top-k in plain torch, a chunk of the catalogue at a time.

Letters: Q queries, D width, E items, C items of a chunk, n columns.
"""

import torch
from torch import Tensor

CHUNK_SCORES = 1 << 22
"""Scores that are held at a time."""


def top_k(
    queries_QD: Tensor, items_ED: Tensor, k: int, is_item_E: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return (Q, k) scores and rows: larger scores first, of equal ones the smaller row.

    Computed in float32 or better. Where fewer than k rows are items, the rest is -inf and -1.
    """
    num_queries, num_items = len(queries_QD), len(items_ED)
    dtype = torch.promote_types(items_ED.dtype, torch.float32)
    queries_QD = queries_QD.to(dtype)
    best_Qn = queries_QD.new_empty(num_queries, 0)
    rows_Qn = torch.empty(num_queries, 0, dtype=torch.int64, device=items_ED.device)
    size = max(k, CHUNK_SCORES // max(1, num_queries))
    for first in range(0, num_items, size):
        score_QC = queries_QD @ items_ED[first : first + size].to(dtype).T
        if is_item_E is not None:
            score_QC.masked_fill_(~is_item_E[first : first + size], -torch.inf)
        chosen = select(score_QC, k)
        # Rows of earlier chunks are smaller, and stand in front.
        best_Qn = torch.cat([best_Qn, score_QC.gather(1, chosen)], 1)
        rows_Qn = torch.cat([rows_Qn, chosen + first], 1)
        chosen = select(best_Qn, k)
        best_Qn, rows_Qn = best_Qn.gather(1, chosen), rows_Qn.gather(1, chosen)
    rows_Qn = rows_Qn.masked_fill(best_Qn == -torch.inf, -1)
    lacking = k - best_Qn.shape[1]
    if lacking > 0:
        best_Qn = torch.nn.functional.pad(best_Qn, (0, lacking), value=-torch.inf)
        rows_Qn = torch.nn.functional.pad(rows_Qn, (0, lacking), value=-1)
    return best_Qn, rows_Qn


def select(score_Qn: Tensor, k: int) -> Tensor:
    """Return (Q, min(k, n)) int64 columns: larger scores first, of equal ones the smaller column.

    torch.topk keeps any of the columns that share the last place, so a row where it had a choice is
    sorted as a whole.
    """
    num_columns = score_Qn.shape[1]
    k = min(k, num_columns)
    if k == 0:
        return torch.empty(len(score_Qn), 0, dtype=torch.int64, device=score_Qn.device)
    best_Qn, column_Qn = score_Qn.topk(min(k + 1, num_columns), sorted=True)
    # Ascending columns, so that the stable sort by score leaves equal ones in that order.
    column_Qk = column_Qn[:, :k].sort(1).values
    order = score_Qn.gather(1, column_Qk).sort(dim=1, descending=True, stable=True).indices
    column_Qk = column_Qk.gather(1, order)
    if num_columns > k:
        shares_Q = best_Qn[:, k - 1] == best_Qn[:, k]
        whole = score_Qn[shares_Q].sort(dim=1, descending=True, stable=True).indices
        column_Qk[shares_Q] = whole[:, :k]
    return column_Qk
