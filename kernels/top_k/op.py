"""Exact top-k of dot products: the operator and its checks."""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import Impl, resolve
from kernels.top_k import reference

MAX_DIM = 512
"""Widest vector that the kernel holds."""


class TopK(NamedTuple):
    """The best items of each query, best first."""

    scores: Tensor
    """(Q, k) float32 or better; -inf where there are fewer items than k."""
    rows: Tensor
    """(Q, k) int64; -1 where there are fewer items than k."""


@torch.no_grad()
def top_k(
    queries_QD: Tensor,
    items_ED: Tensor,
    k: int,
    *,
    is_item_E: Tensor | None = None,
    impl: Impl | str = Impl.AUTO,
) -> TopK:
    """Return the k rows with the largest dot products, of equal ones the smaller row. Exact.

        score_qe = q . x_e, accumulated in float32 (float64 of float64 vectors)

    Scores that are NaN or -inf have no defined place. Not differentiable.

    Args:
        queries_QD: (Q, D), of the dtype of the items: round them yourself.
        items_ED: (E, D) float32, float16 or bfloat16 (reference: also float64), contiguous.
        k: how many, at least 1; may exceed E.
        is_item_E: (E,) bool, rows that may be found; None: all.
        impl: which implementation runs. The kernel writes one number for 64 items and query
            instead of all scores.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit, or D is above 512 (Triton).
    """
    if queries_QD.dim() != 2 or items_ED.dim() != 2 or queries_QD.shape[1] != items_ED.shape[1]:
        raise ValueError(
            f"queries must be (Q, D) and items (E, D), got {tuple(queries_QD.shape)} and "
            f"{tuple(items_ED.shape)}"
        )
    if queries_QD.dtype != items_ED.dtype or queries_QD.device != items_ED.device:
        raise ValueError(
            f"queries are {queries_QD.dtype} on {queries_QD.device}, items {items_ED.dtype} on "
            f"{items_ED.device}: bring the queries to what the items are"
        )
    if is_item_E is not None and (
        is_item_E.shape != items_ED.shape[:1]
        or is_item_E.dtype != torch.bool
        or is_item_E.device != items_ED.device
    ):
        raise ValueError(
            f"is_item must be ({len(items_ED)},) bool on {items_ED.device}, got "
            f"{tuple(is_item_E.shape)} {is_item_E.dtype} on {is_item_E.device}"
        )
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if resolve(impl, items_ED) is Impl.REFERENCE:
        return TopK(*reference.top_k(queries_QD, items_ED, k, is_item_E))
    if items_ED.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"items must be float32, float16 or bfloat16, got {items_ED.dtype}: use "
            "impl='reference'"
        )
    if len(items_ED) >= 1 << 31:
        raise ValueError(f"the kernel takes fewer than 2^31 items, got {len(items_ED)}")
    if not 1 <= items_ED.shape[1] <= MAX_DIM or not items_ED.is_contiguous():
        raise ValueError(
            f"the kernel takes contiguous vectors of 1 .. {MAX_DIM} numbers, got "
            f"{tuple(items_ED.shape)} with strides {items_ED.stride()}: use impl='reference'"
        )
    run = _operator if torch.compiler.is_compiling() else _top_k
    return TopK(*run(queries_QD.contiguous(), items_ED, k, is_item_E))


def _top_k(queries: Tensor, items: Tensor, k: int, is_item: Tensor | None) -> tuple[Tensor, Tensor]:
    # Loaded when used: the reference works without Triton.
    from kernels.top_k import _triton

    return _triton.top_k(queries, items, k, is_item)


# For compiled graphs; eager calls go without it, which takes 0.2 ms of a processor a call.
_operator = torch.library.custom_op("gr::top_k", _top_k, mutates_args=())


@_operator.register_fake
def _(queries: Tensor, items: Tensor, k: int, is_item: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(
        shape, dtype=torch.int64
    )
