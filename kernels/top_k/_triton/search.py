"""Top-k of dot products that writes the largest score of each group of items, not every score.

1. For each group of GROUP consecutive items and each query: the largest score. One read of the
   catalogue; the result is GROUP times smaller than the scores.
2. The k groups with the largest such scores hold the top k: an item of the top k whose group was
   not among them would have k items before it, one in each. They are found through the largest of
   SUPER consecutive groups, for the same reason.
3. The items of these groups are scored again, by the same product, hence to the same bits, and the
   top k of them chosen.

The k-th largest score of the super groups is a bound that at least k items reach. So steps 2 and 3
keep what reaches it, a little more than k groups and items, in lists; where scores are equal by the
thousand a list may overflow, and then the groups are chosen and all their items sorted.

Of equal scores the smaller row (group, super group) comes first in each step, so the argument holds
for equal scores too. A score and its index are one int64 key, whose order is that.

Letters: Q queries, E items, D width, G groups, S super groups.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.top_k._triton.lists import SUPER, by_bound
from kernels.top_k._triton.scores import GROUP, found, group_scores, queries, scores_and_indices

QUERIES_AT_A_TIME = 256
"""Bounds what step 1 writes: 4 bytes a group and query."""
PROGRAMS_PER_SM = 8
"""Of 2 and 8 the pass over 10 M items took 1.5 % less than of 4 (H200)."""


@triton.jit
def _group_max_kernel(
    q_ptr,
    x_ptr,
    is_item_ptr,
    max_ptr,
    Q,
    E,
    D,
    G,
    programs,
    GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    first = tl.program_id(1) * BLOCK_Q
    q = queries(q_ptr, first, Q, D, BLOCK_Q, BLOCK_D)
    offs_q = first + tl.arange(0, BLOCK_Q)
    for tile in tl.range(tl.program_id(0), G, programs):
        score = group_scores(q, x_ptr, is_item_ptr, tile, E, D, GROUP, BLOCK_D, HAS_MASK)
        # Queries side by side: with groups side by side each number would be a write of its own.
        row = tl.zeros([BLOCK_Q], tl.int64) + tile
        tl.store(max_ptr + row * Q + offs_q, tl.max(score, 1), mask=offs_q < Q)


@triton.jit
def _rescore_kernel(
    q_ptr,
    x_ptr,
    is_item_ptr,
    group_ptr,
    score_ptr,
    Q,
    E,
    D,
    chosen,
    GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    query = tl.program_id(1)
    # The block of queries that step 1 had it in: another place could round otherwise.
    first = query // BLOCK_Q * BLOCK_Q
    q = queries(q_ptr, first, Q, D, BLOCK_Q, BLOCK_D)
    place = query.to(tl.int64) * chosen + tl.program_id(0)
    tile = tl.load(group_ptr + place)
    score = group_scores(q, x_ptr, is_item_ptr, tile, E, D, GROUP, BLOCK_D, HAS_MASK)
    is_own = first + tl.arange(0, BLOCK_Q) == query
    own = tl.max(tl.where(is_own[:, None], score, float("-inf")), 0)
    tl.store(score_ptr + place * GROUP + tl.arange(0, GROUP), own)


def top_k(
    queries_QD: Tensor, items_ED: Tensor, k: int, is_item_E: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return (Q, k) float32 scores and int64 rows."""
    num_items = len(items_ED)
    if num_items == 0 or len(queries_QD) == 0:
        shape = (len(queries_QD), k)
        return (
            torch.full(shape, -torch.inf, device=items_ED.device),
            torch.full(shape, -1, dtype=torch.int64, device=items_ED.device),
        )
    if len(queries_QD) <= QUERIES_AT_A_TIME:
        return _top_k(queries_QD, items_ED, k, is_item_E)
    parts = [
        _top_k(queries_QD[first : first + QUERIES_AT_A_TIME], items_ED, k, is_item_E)
        for first in range(0, len(queries_QD), QUERIES_AT_A_TIME)
    ]
    return torch.cat([scores for scores, _ in parts]), torch.cat([rows for _, rows in parts])


def _top_k(
    queries_QD: Tensor, items_ED: Tensor, k: int, is_item_E: Tensor | None
) -> tuple[Tensor, Tensor]:
    (num_queries, dim), num_items = queries_QD.shape, len(items_ED)
    num_groups = triton.cdiv(num_items, GROUP)
    options = {
        "GROUP": GROUP,
        "BLOCK_Q": max(16, min(64, triton.next_power_of_2(num_queries))),
        "BLOCK_D": max(16, triton.next_power_of_2(dim)),
        "HAS_MASK": is_item_E is not None,
        "num_warps": 4,
    }
    programs = min(num_groups, PROGRAMS_PER_SM * _num_multiprocessors(items_ED.device))
    max_GQ = torch.empty(num_groups, num_queries, device=items_ED.device)
    _group_max_kernel[(programs, triton.cdiv(num_queries, options["BLOCK_Q"]))](
        queries_QD,
        items_ED,
        is_item_E,
        max_GQ,
        num_queries,
        num_items,
        dim,
        num_groups,
        programs,
        num_stages=4,
        **options,
    )
    if triton.cdiv(num_groups, SUPER) > k:
        best, num_listed, room = by_bound(queries_QD, items_ED, k, is_item_E, max_GQ, options)
        # Asked last: the host waits here for all that it has asked for.
        if int(num_listed) <= room:
            return best
    score_Qn, row_Qn = found(*_by_groups(queries_QD, items_ED, k, is_item_E, max_GQ, options))
    lacking = k - score_Qn.shape[1]
    if lacking > 0:
        score_Qn = torch.nn.functional.pad(score_Qn, (0, lacking), value=-torch.inf)
        row_Qn = torch.nn.functional.pad(row_Qn, (0, lacking), value=-1)
    return score_Qn, row_Qn


def _by_groups(
    queries_QD: Tensor,
    items_ED: Tensor,
    k: int,
    is_item_E: Tensor | None,
    max_GQ: Tensor,
    options: dict[str, int],
) -> tuple[Tensor, Tensor]:
    """Return the top k of the items of the k best groups."""
    num_queries = len(queries_QD)
    group_Qc = _best_groups(max_GQ, k)
    chosen = group_Qc.shape[1]
    score_Qn = torch.empty(num_queries, chosen * GROUP, device=items_ED.device)
    _rescore_kernel[(chosen, num_queries)](
        queries_QD,
        items_ED,
        is_item_E,
        group_Qc,
        score_Qn,
        num_queries,
        len(items_ED),
        items_ED.shape[1],
        chosen,
        num_stages=1,
        **options,
    )
    row_Qn = group_Qc.repeat_interleave(GROUP, 1) * GROUP
    row_Qn += torch.arange(GROUP, device=row_Qn.device).repeat(chosen)
    return _best(score_Qn, row_Qn, k)


def _best_groups(max_GQ: Tensor, k: int) -> Tensor:
    """Return (Q, min(k, G)) int64: the groups with the largest scores."""
    num_groups, num_queries = max_GQ.shape
    group_G = torch.arange(num_groups, device=max_GQ.device).expand(num_queries, -1)
    if num_groups <= k:
        return group_G.contiguous()
    return _best(max_GQ.T.contiguous(), group_G, k)[1]


def _best(score_Qn: Tensor, index_Qn: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest scores and their indices, of equal ones the smaller index.

    Args:
        score_Qn: float32.
        index_Qn: int64, 0 .. 2^32 - 1.
        k: how many; all if there are fewer.
    """
    bits = score_Qn.view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    key_Qn = (ordered << 32) + (0xFFFFFFFF - index_Qn)
    return scores_and_indices(key_Qn.topk(min(k, key_Qn.shape[1]), 1, sorted=True).values)


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # the interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count
