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

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP, SUPER = 64, 64
SPARE = 64
"""A list has room for 2 k + SPARE."""
QUERIES_AT_A_TIME = 256
"""Bounds what step 1 writes: 4 bytes a group and query."""
PROGRAMS_PER_SM = 4


@triton.jit
def _scores(
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
def _queries(q_ptr, first, Q, D, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = first + tl.arange(0, BLOCK_Q)
    cols = tl.arange(0, BLOCK_D)
    mask = (rows < Q)[:, None] & (cols < D)[None, :]
    return tl.load(q_ptr + rows[:, None] * D + cols[None, :], mask=mask, other=0.0)


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
    q = _queries(q_ptr, first, Q, D, BLOCK_Q, BLOCK_D)
    offs_q = first + tl.arange(0, BLOCK_Q)
    for tile in tl.range(tl.program_id(0), G, programs):
        score = _scores(q, x_ptr, is_item_ptr, tile, E, D, GROUP, BLOCK_D, HAS_MASK)
        # Queries side by side: with groups side by side each number would be a write of its own.
        row = tl.zeros([BLOCK_Q], tl.int64) + tile
        tl.store(max_ptr + row * Q + offs_q, tl.max(score, 1), mask=offs_q < Q)


@triton.jit
def _keys(score, index):
    """Return int64 keys that are ordered as (score, then smaller index)."""
    bits = score.to(tl.int32, bitcast=True)
    # Floating numbers as integers that are ordered alike.
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    return (ordered << 32) + (0xFFFFFFFF - index)


@triton.jit
def _super_kernel(max_ptr, key_ptr, Q, G, S, SUPER: tl.constexpr, BLOCK_Q: tl.constexpr):
    number = tl.program_id(0)
    groups = number * SUPER + tl.arange(0, SUPER).to(tl.int64)
    offs_q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    mask = (groups < G)[:, None] & (offs_q < Q)[None, :]
    most = tl.load(max_ptr + groups[:, None] * Q + offs_q[None, :], mask=mask, other=float("-inf"))
    index = tl.zeros([BLOCK_Q], tl.int64) + number
    tl.store(key_ptr + offs_q.to(tl.int64) * S + number, _keys(tl.max(most, 0), index), offs_q < Q)


@triton.jit
def _append(list_ptr, count_ptr, query, room, keep, values):
    """Add some values to a query's list; its count goes on past the room."""
    before = tl.atomic_add(count_ptr + query, tl.sum(keep.to(tl.int32), 0))
    place = before + tl.cumsum(keep.to(tl.int32), 0) - 1
    row = query.to(tl.int64) * room
    tl.store(list_ptr + row + place, values, mask=keep & (place < room))


@triton.jit
def _pick_kernel(
    max_ptr, super_ptr, bound_ptr, list_ptr, count_ptr, Q, G, k, room, SUPER: tl.constexpr
):
    query = tl.program_id(1)
    number = 0xFFFFFFFF - (tl.load(super_ptr + query * k + tl.program_id(0)) & 0xFFFFFFFF)
    groups = number * SUPER + tl.arange(0, SUPER)
    most = tl.load(max_ptr + groups * Q + query, mask=groups < G, other=float("-inf"))
    keep = (groups < G) & ((_keys(most, groups) >> 32) >= tl.load(bound_ptr + query))
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
    if tl.program_id(0) < tl.load(num_groups_ptr + query):
        # The block of queries that step 1 had it in: another place could round otherwise.
        first = query // BLOCK_Q * BLOCK_Q
        q = _queries(q_ptr, first, Q, D, BLOCK_Q, BLOCK_D)
        tile = tl.load(group_ptr + query.to(tl.int64) * room + tl.program_id(0))
        score = _scores(q, x_ptr, is_item_ptr, tile, E, D, GROUP, BLOCK_D, HAS_MASK)
        is_own = first + tl.arange(0, BLOCK_Q) == query
        own = tl.max(tl.where(is_own[:, None], score, float("-inf")), 0)
        keys = _keys(own, tile * GROUP + tl.arange(0, GROUP))
        keep = (keys >> 32) >= tl.load(bound_ptr + query)
        _append(list_ptr, count_ptr, query, room, keep, keys)


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
    q = _queries(q_ptr, first, Q, D, BLOCK_Q, BLOCK_D)
    place = query.to(tl.int64) * chosen + tl.program_id(0)
    tile = tl.load(group_ptr + place)
    score = _scores(q, x_ptr, is_item_ptr, tile, E, D, GROUP, BLOCK_D, HAS_MASK)
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
        found, num_listed, room = _by_bound(queries_QD, items_ED, k, is_item_E, max_GQ, options)
        filled = _filled(*found, k)
        # Asked last: the host waits here for all that it has asked for.
        if int(num_listed) <= room:
            return filled
    return _filled(*_by_groups(queries_QD, items_ED, k, is_item_E, max_GQ, options), k)


def _filled(score_Qn: Tensor, row_Qn: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return (Q, k) scores and rows, -inf and -1 where nothing was found."""
    row_Qn = row_Qn.masked_fill(score_Qn == -torch.inf, -1)
    lacking = k - score_Qn.shape[1]
    if lacking > 0:
        score_Qn = torch.nn.functional.pad(score_Qn, (0, lacking), value=-torch.inf)
        row_Qn = torch.nn.functional.pad(row_Qn, (0, lacking), value=-1)
    return score_Qn, row_Qn


def _by_bound(
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
    bound_Q = super_Qk.amin(1) >> 32
    group_Qr = torch.empty(num_queries, room, dtype=torch.int64, device=device)
    # Below every key of a score.
    key_Qr = torch.full((num_queries, room), -(2**63), dtype=torch.int64, device=device)
    count_2Q = torch.zeros(2, num_queries, dtype=torch.int32, device=device)
    _pick_kernel[(k, num_queries)](
        max_GQ,
        super_Qk,
        bound_Q,
        group_Qr,
        count_2Q[0],
        num_queries,
        num_groups,
        k,
        room,
        SUPER=SUPER,
        num_warps=1,
    )
    _rescore_listed_kernel[(room, num_queries)](
        queries_QD,
        items_ED,
        is_item_E,
        group_Qr,
        count_2Q[0],
        bound_Q,
        key_Qr,
        count_2Q[1],
        num_queries,
        len(items_ED),
        items_ED.shape[1],
        room,
        num_stages=1,
        **options,
    )
    best = _scores_and_indices(key_Qr.topk(k, 1, sorted=True).values)
    return best, count_2Q.max(), room


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
    return _scores_and_indices(key_Qn.topk(min(k, key_Qn.shape[1]), 1, sorted=True).values)


def _scores_and_indices(key_Qk: Tensor) -> tuple[Tensor, Tensor]:
    """Return what keys were made of."""
    index_Qk = 0xFFFFFFFF - (key_Qk & 0xFFFFFFFF)
    high = (key_Qk >> 32).to(torch.int32)
    return torch.where(high < 0, high ^ 0x7FFFFFFF, high).view(torch.float32), index_Qk


def _num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # the interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count
