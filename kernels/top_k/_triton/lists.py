"""What reaches a bound that at least k items reach: listed, scored again, and sorted.

Letters: Q queries, E items, D width, G groups, S super groups.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.top_k._triton.scores import found, group_scores, keys, queries, scores_and_indices

SUPER = 64
"""Consecutive groups of which the largest score makes the bound."""
SPARE = 64
"""A list has room for 2 k + SPARE."""
PICKED = 16
"""Super groups that one program looks through."""
SHARES = 32
"""Programs that score the listed groups of a query."""
MOST_SORTED = 4096
"""Room of a list that one program sorts."""
NOTHING = -(2**63 - 1)
"""Below every key of a score."""


@triton.jit
def _super_kernel(max_ptr, key_ptr, Q, G, S, SUPER: tl.constexpr, BLOCK_Q: tl.constexpr):
    number = tl.program_id(0)
    groups = number * SUPER + tl.arange(0, SUPER).to(tl.int64)
    offs_q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    mask = (groups < G)[:, None] & (offs_q < Q)[None, :]
    most = tl.load(max_ptr + groups[:, None] * Q + offs_q[None, :], mask=mask, other=float("-inf"))
    index = tl.zeros([BLOCK_Q], tl.int64) + number
    tl.store(key_ptr + offs_q.to(tl.int64) * S + number, keys(tl.max(most, 0), index), offs_q < Q)


@triton.jit
def _append(list_ptr, count_ptr, query, room, keep, values):
    """Add some values to a query's list; its count goes on past the room."""
    before = tl.atomic_add(count_ptr + query, tl.sum(keep.to(tl.int32), 0))
    place = before + tl.cumsum(keep.to(tl.int32), 0) - 1
    row = query.to(tl.int64) * room
    tl.store(list_ptr + row + place, values, mask=keep & (place < room))


@triton.jit
def _pick_kernel(
    max_ptr, super_ptr, bound_ptr, list_ptr, count_ptr, Q, G, k, room,
    SUPER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """List the groups that reach the bound, of BLOCK of the k best super groups of a query."""
    query = tl.program_id(1)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(super_ptr + query * k + place, mask=place < k, other=0)
    number = 0xFFFFFFFF - (key & 0xFFFFFFFF)
    groups = number[:, None] * SUPER + tl.arange(0, SUPER)[None, :]
    groups = tl.reshape(groups, [BLOCK * SUPER])
    # Those of a place behind the last are no groups: their number is the largest.
    most = tl.load(max_ptr + groups * Q + query, mask=groups < G, other=float("-inf"))
    bound = tl.load(bound_ptr + query) >> 32
    keep = (groups < G) & ((keys(most, groups) >> 32) >= bound)
    _append(list_ptr, count_ptr, query, room, keep, groups)


@triton.jit
def _rescore_listed_kernel(
    q_ptr,
    x_ptr,
    is_item_ptr,
    group_ptr,
    num_groups_ptr,
    bound_ptr,
    list_ptr,
    count_ptr,
    Q,
    E,
    D,
    room,
    GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    query = tl.program_id(1)
    # The block of queries that step 1 had it in: another place could round otherwise.
    first = query // BLOCK_Q * BLOCK_Q
    q = queries(q_ptr, first, Q, D, BLOCK_Q, BLOCK_D)
    is_own = first + tl.arange(0, BLOCK_Q) == query
    bound = tl.load(bound_ptr + query) >> 32
    listed = tl.minimum(tl.load(num_groups_ptr + query), room)
    for i in tl.range(tl.program_id(0), listed, tl.num_programs(0)):
        tile = tl.load(group_ptr + query.to(tl.int64) * room + i)
        score = group_scores(q, x_ptr, is_item_ptr, tile, E, D, GROUP, BLOCK_D, HAS_MASK)
        own = tl.max(tl.where(is_own[:, None], score, float("-inf")), 0)
        key = keys(own, tile * GROUP + tl.arange(0, GROUP))
        _append(list_ptr, count_ptr, query, room, (key >> 32) >= bound, key)


@triton.jit
def _sort_kernel(
    list_ptr, count_ptr, most_ptr, score_ptr, row_ptr, Q, k, room,
    NOTHING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sort the list of a query; note how long the longest list would have been."""
    query = tl.program_id(0)
    num_groups, num_items = tl.load(count_ptr + query), tl.load(count_ptr + Q + query)
    tl.atomic_max(most_ptr, tl.maximum(num_groups, num_items))
    place = tl.arange(0, BLOCK)
    key = tl.load(
        list_ptr + query.to(tl.int64) * room + place,
        mask=place < tl.minimum(num_items, room),
        other=NOTHING,
    )
    key = tl.sort(key, descending=True)
    high = (key >> 32).to(tl.int32)
    score = tl.where(high < 0, high ^ 0x7FFFFFFF, high).to(tl.float32, bitcast=True)
    is_found = (key > NOTHING) & (score > float("-inf"))
    at = query.to(tl.int64) * k + place
    tl.store(score_ptr + at, tl.where(is_found, score, float("-inf")), mask=place < k)
    tl.store(row_ptr + at, tl.where(is_found, 0xFFFFFFFF - (key & 0xFFFFFFFF), -1), mask=place < k)


def by_bound(
    queries_QD: Tensor,
    items_ED: Tensor,
    k: int,
    is_item_E: Tensor | None,
    max_GQ: Tensor,
    options: dict[str, int],
) -> tuple[tuple[Tensor, Tensor], Tensor, int]:
    """Return the top k of what reaches the bound, how long the longest list is, and its room."""
    (num_groups, num_queries), device = max_GQ.shape, max_GQ.device
    num_super, room = triton.cdiv(num_groups, SUPER), 2 * k + SPARE
    key_QS = torch.empty(num_queries, num_super, dtype=torch.int64, device=device)
    block_q = max(16, min(64, triton.next_power_of_2(num_queries)))
    _super_kernel[(num_super, triton.cdiv(num_queries, block_q))](
        max_GQ, key_QS, num_queries, num_groups, num_super, SUPER=SUPER, BLOCK_Q=block_q
    )
    super_Qk = key_QS.topk(k, 1, sorted=False).values
    bound_Q = super_Qk.amin(1)
    group_Qr, key_Qr = torch.empty(2, num_queries, room, dtype=torch.int64, device=device)
    # Groups and items listed of each query, and the most of all.
    counts = torch.zeros(2 * num_queries + 1, dtype=torch.int32, device=device)
    _pick_kernel[(triton.cdiv(k, PICKED), num_queries)](
        max_GQ,
        super_Qk,
        bound_Q,
        group_Qr,
        counts,
        num_queries,
        num_groups,
        k,
        room,
        SUPER=SUPER,
        BLOCK=PICKED,
        num_warps=4,
    )
    _rescore_listed_kernel[(min(room, SHARES), num_queries)](
        queries_QD,
        items_ED,
        is_item_E,
        group_Qr,
        counts,
        bound_Q,
        key_Qr,
        counts[num_queries:],
        num_queries,
        len(items_ED),
        items_ED.shape[1],
        room,
        num_stages=3,
        **options,
    )
    if room > MOST_SORTED:
        is_empty = torch.arange(room, device=device) >= counts[num_queries:-1, None]
        best_Qk = key_Qr.masked_fill_(is_empty, NOTHING).topk(k, 1, sorted=True).values
        return found(*scores_and_indices(best_Qk)), counts.max(), room
    score_Qk = torch.empty(num_queries, k, device=device)
    row_Qk = torch.empty(num_queries, k, dtype=torch.int64, device=device)
    block = triton.next_power_of_2(room)
    _sort_kernel[(num_queries,)](
        key_Qr,
        counts,
        counts[-1:],
        score_Qk,
        row_Qk,
        num_queries,
        k,
        room,
        NOTHING=NOTHING,
        BLOCK=block,
        num_warps=4 if block <= 1024 else 8,
    )
    return (score_Qk, row_Qk), counts[-1], room
