"""Ranks of retrieval targets among the full catalogue, and what is reported of them.

Letters: R retrieval positions, D width of an item row, E rows of the item table, C rows of a chunk
of it, S pairs.
"""

import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from gr.task_metrics import (
    Array,
    Columns,
    Metrics,
    Series,
    divide,
    float64_columns,
    weighted_sums,
)

RETRIEVAL = "retrieval"

MISS = 2**31 - 1
"""Rank of what cannot be found, beyond any cut-off."""

BLOCK_ROWS = 256
"""Positions scored at a time: scores of 256 x 7,600 items fit the caches of a CPU."""
BLOCK_SCORES = 1 << 26
"""The same on a GPU, in scores (256 MB), which waits for the host between blocks."""


@torch.no_grad()
def catalogue_ranks(
    user_RD: Tensor,
    target_RD: Tensor,
    target_rows_R: Tensor,
    chunks: Iterable[tuple[int, Tensor]],
    *,
    temperature: float = 1.0,
    seen: tuple[Tensor, Tensor] | None = None,
    is_item_E: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the rank of each target among all items, and its log probability.

        score_e = u . x_e / temperature
        rank = 1 + #(e: score_e > score_target) + #(e < target: score_e = score_target)
        log_prob = score_target - log(sum over e of exp(score_e))

    Row 0, the unknown item, is not an item. Equal scores, as of rows that never trained, go by row
    number. Scores are compared as fp32 rounds them. At most 256 x C scores are held on a CPU, 2^26
    or 256 x C on a GPU.

    Args:
        user_RD: user vectors, as `gr.heads.RetrievalHead` returns them.
        target_RD: item vectors of the targets.
        target_rows_R: int64, rows of the targets in the item table.
        chunks: (first row, item vectors (C, D)) of the whole item table, each row once.
        temperature: divides the scores; changes no rank.
        seen: (positions (S,), rows (S,)), int64: pairs to leave out of the ranking of a position,
            unless the row is its target. The log probability stays that of the full catalogue.
        is_item_E: (E,) bool: which rows of the table are items, where not all but row 0 are.
            A target of row 0 is then an item that the table does not know: its rank is MISS, and
            its probability that of a guess, 1 / E.

    Returns:
        (R,) int64 ranks, 0 where the target is row 0 or in no chunk (EvalAccumulator refuses them);
        (R,) log probabilities in fp32 or better.
    """
    dtype = torch.promote_types(user_RD.dtype, torch.float32)
    user_RD = user_RD.to(dtype) / temperature
    score_R = (user_RD * target_RD.to(dtype)).sum(1)
    not_worse_R = torch.zeros_like(target_rows_R)
    found_R = torch.zeros_like(target_rows_R, dtype=torch.bool)
    normalizer_R = torch.full_like(score_R, -torch.inf)
    for first, items_CD in chunks:
        if first == 0:
            first, items_CD = 1, items_CD[1:]
        if len(items_CD) == 0:
            continue
        rows_C = torch.arange(first, first + len(items_CD), device=user_RD.device)
        items_CD = items_CD.to(dtype)
        rows = BLOCK_ROWS
        if user_RD.is_cuda:
            rows = max(rows, BLOCK_SCORES // len(items_CD))
        for start in range(0, len(user_RD), rows):
            block = slice(start, start + rows)
            score_BC = user_RD[block] @ items_CD.T
            if is_item_E is not None:
                score_BC.masked_fill_(~is_item_E[rows_C], -torch.inf)
            normalizer_R[block] = torch.logaddexp(normalizer_R[block], score_BC.logsumexp(1))
            if seen is not None:
                _leave_out(score_BC, start, first, seen)
            column_B1 = (target_rows_R[block] - first)[:, None]
            is_here_B1 = (column_B1 >= 0) & (column_B1 < len(items_CD))
            found_R[block] |= is_here_B1[:, 0]
            # A target does not count against itself; elsewhere column 0 keeps its score.
            column_B1 = column_B1.where(is_here_B1, 0)
            own_B1 = score_BC.gather(1, column_B1).where(~is_here_B1, -torch.inf)
            score_BC.scatter_(1, column_B1, own_B1)
            target_B1 = score_R[block, None]
            before_BC = rows_C < target_rows_R[block, None]
            ahead_BC = (score_BC > target_B1) | ((score_BC == target_B1) & before_BC)
            not_worse_R[block] += ahead_BC.sum(1)
    rank_R, log_prob_R = torch.where(found_R, not_worse_R + 1, 0), score_R - normalizer_R
    if is_item_E is not None:
        is_known_R = target_rows_R > 0
        rank_R = rank_R.where(is_known_R, MISS)
        log_prob_R = log_prob_R.where(is_known_R, -math.log(len(is_item_E)))
    return rank_R, log_prob_R


def _leave_out(score_BC: Tensor, start: int, first: int, seen: tuple[Tensor, Tensor]) -> None:
    position_S, column_S = seen[0] - start, seen[1] - first
    num_positions, num_columns = score_BC.shape
    inside = (position_S >= 0) & (position_S < num_positions)
    inside &= (column_S >= 0) & (column_S < num_columns)
    score_BC[position_S[inside], column_S[inside]] = -torch.inf


class RetrievalSeries(Series):
    """Ranks of targets, their log probabilities and weights.

    Args:
        ks: cut-offs of hr and ndcg.
        cohort: ends the names of the metrics, where only some predictions are counted.

    Raises:
        ValueError: if a cut-off is below 1.
    """

    columns: Mapping[str, torch.dtype] = {
        "rank": torch.int64,
        "log_prob": torch.float32,
        "weight": torch.float32,
    }

    def __init__(self, ks: Iterable[int], cohort: str = "") -> None:
        super().__init__(RETRIEVAL + cohort)
        self.cohort = cohort
        self.ks = tuple(ks)
        if any(k < 1 for k in self.ks):
            raise ValueError(
                f"cut-offs of hr and ndcg must be at least 1, got {self.ks}: see eval.ks"
            )
        self.num_sums = 4 + 2 * len(self.ks)

    def check(self, columns: Columns) -> None:
        """Refuse also targets without a rank."""
        super().check(columns)
        rule = "a rank must be at least 1 (0: the target is row 0 or not in the catalogue)"
        self.refuse(columns["rank"] < 1, columns["rank"], rule)

    def sums(self, columns: Columns) -> Array:
        """Return number, weight, 1 / rank, -log_prob, then hits and gains at each cut-off."""
        rank, log_prob, w = float64_columns(columns, "rank", "log_prob", "weight")
        hits = [w * (rank <= k) for k in self.ks]
        gains = [hit / np.log2(rank + 1) for hit in hits]
        return weighted_sums(w, w / rank, -w * log_prob, *hits, *gains)

    def metrics(self, sums: Array, columns: Columns | None) -> Metrics:
        """Return hr@k, ndcg@k, mrr, log_pplx."""
        num, weight, reciprocal, log_pplx, *rest = sums.tolist()
        values: Metrics = {}
        for k, hits, gains in zip(self.ks, rest[: len(self.ks)], rest[len(self.ks) :], strict=True):
            values[f"hr@{k}"] = divide(hits, weight)
            values[f"ndcg@{k}"] = divide(gains, weight)
        values["mrr"] = divide(reciprocal, weight)
        values["log_pplx"] = divide(log_pplx, weight)
        values[f"num_examples-{RETRIEVAL}"] = int(num)
        return {f"{name}{self.cohort}": value for name, value in values.items()}
