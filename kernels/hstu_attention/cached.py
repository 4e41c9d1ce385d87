"""Attention of new tokens over cached keys and values, and among themselves.

Letters: B sequences, R new tokens, C rows of the cache, G pages of a sequence at most, H heads,
K dim of queries and keys, V dim of values.
"""

from collections.abc import Callable
from dataclasses import astuple
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import Impl, resolve
from kernels.hstu_attention.arguments import (
    check_bias,
    check_scaling,
    check_supported,
    check_tensors,
)
from kernels.hstu_attention.bias import RelativeBias
from kernels.hstu_attention.mask import AttentionMask
from kernels.hstu_attention.op import hstu_attention

PAGE = 128
"""Rows of a page of the cache."""


class CachedKeys(NamedTuple):
    """Keys and values of the tokens that come before the new ones, in pages of PAGE rows."""

    k: Tensor
    """(C, H, K), C a multiple of PAGE; turned already where keys are."""
    v: Tensor
    """(C, H, V)."""
    time: Tensor | None
    """(C,) int64 s, when each key happened; with a bias by time only."""
    pages: Tensor
    """(B, G) int32: token i of sequence b is in row pages[b, i // PAGE] * PAGE + i % PAGE."""
    lengths: Tensor
    """(B,) int64: cached tokens of each sequence."""
    max_len: int
    """At least the most of them."""


def hstu_attention_cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    cached: CachedKeys,
    *,
    max_len: int,
    alpha: float,
    scaling_length: float | None,
    activation: Literal["silu", "softmax"] = "silu",
    mask: AttentionMask = AttentionMask(),  # noqa: B008 (immutable)
    num_candidates: Tensor | None = None,
    bias: RelativeBias | None = None,
    impl: Impl | str = Impl.AUTO,
) -> Tensor:
    """Return what hstu_attention gives for the new tokens of sequences of cached and new ones.

    No gradient. Mask and bias see a sequence whole: its cached tokens, then its new ones, the last
    of which may be candidates. Contextual tokens are cached, or nothing of their sequence is.

    Args:
        q: (R, H, K) floating, of the new tokens.
        k: (R, H, K), dtype of q.
        v: (R, H, V), dtype of q.
        offsets: (B + 1,) int64: new tokens of sequence b are offsets[b]:offsets[b + 1].
        cached: what comes before them; dtype of q.
        max_len: at least the most new tokens of a sequence.
        alpha: as of hstu_attention, like those that follow.
        scaling_length: divisor of the SiLU weights; None with softmax.
        activation: what makes weights of scores.
        mask: which keys a query sees.
        num_candidates: (B,) int64, candidates at the end of the new tokens. None means none.
        bias: query_time and key_time are those of the new tokens.
        impl: which implementation runs. The kernel takes K and V of multiples of 16 in 16 bits:
            others go by way of whole sequences laid out side by side, as in the reference.

    Returns:
        (R, H, V), dtype of q.

    Raises:
        ValueError: if an argument does not fit the others, naming it.

    Source: M-FALCON, HSTU (arXiv 2402.17152), section 3.4 and appendix H.
    """
    check_tensors(q, k, v, offsets, offsets, num_candidates)
    check_scaling(activation, scaling_length)
    _check_cached(cached, k, v, offsets)
    if bias is not None:
        check_bias(bias, q, k)
        if bias.time_table is not None and cached.time is None:
            raise ValueError("bias.time_table needs cached.time, got None")
    implementation = resolve(impl, q)
    kernel = implementation is not Impl.REFERENCE and is_aligned(q.dtype, q.shape[2], v.shape[2])
    if kernel:
        check_supported(q, v)
    # Windowed candidates are the cached kernel's and the reference's.
    whole = Impl.REFERENCE if mask.windowed_candidates else implementation
    options = (float(alpha), scaling_length, activation, *astuple(mask), "" if kernel else whole)
    tables: tuple[Tensor | None, ...] = (None,) * 4
    if bias is not None:
        tables = (bias.position_table, bias.time_table, bias.query_time, bias.key_time)
    run: Callable[..., Tensor] = _operator if torch.compiler.is_compiling() else _attend
    with torch.no_grad():
        return run(q, k, v, offsets, *cached, num_candidates, *tables, max_len, *options)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    cached_k: Tensor,
    cached_v: Tensor,
    cached_time: Tensor | None,
    pages: Tensor,
    lengths: Tensor,
    cached_max_len: int,
    num_candidates: Tensor | None,
    position_table: Tensor | None,
    time_table: Tensor | None,
    query_time: Tensor | None,
    key_time: Tensor | None,
    max_len: int,
    alpha: float,
    scaling_length: float | None,
    activation: Literal["silu", "softmax"],
    num_context: int,
    context: Literal["causal", "prefix", "prefix_sees_all"],
    local_window: int | None,
    global_rows: int,
    global_columns: int,
    windowed_candidates: bool,
    whole: str,
) -> Tensor:
    """Compute it; `whole` names what attends over whole sequences, "" is the cached kernel."""
    cached = CachedKeys(cached_k, cached_v, cached_time, pages, lengths, cached_max_len)
    bias = None
    if position_table is not None:
        bias = RelativeBias(position_table, time_table, query_time, key_time)
    mask = AttentionMask(
        num_context=num_context,
        context=context,
        local_window=local_window,
        global_rows=global_rows,
        global_columns=global_columns,
        windowed_candidates=windowed_candidates,
    )
    if whole:
        return _gathered(
            q,
            k,
            v,
            offsets,
            cached,
            max_len=max_len,
            alpha=alpha,
            scaling_length=scaling_length,
            activation=activation,
            mask=mask,
            num_candidates=num_candidates,
            bias=bias,
            impl=whole,
        )
    from kernels.hstu_attention._triton.cached import hstu_attention_cached as run

    return run(
        q,
        k,
        v,
        offsets,
        cached,
        max_len=max_len,
        alpha=alpha,
        scaling_length=scaling_length,
        softmax=activation == "softmax",
        mask=mask,
        num_candidates=num_candidates,
        bias=bias,
        page=PAGE,
    )


# For compiled graphs; eager calls go without it, which takes 0.2 ms of a processor a call.
_operator = torch.library.custom_op(
    "gr::hstu_attention_cached",
    _attend,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor offsets, Tensor cached_k, Tensor cached_v, "
    "Tensor? cached_time, Tensor pages, Tensor lengths, SymInt cached_max_len, "
    "Tensor? num_candidates, Tensor? position_table, Tensor? time_table, Tensor? query_time, "
    "Tensor? key_time, SymInt max_len, float alpha, float? scaling_length, str activation, "
    "SymInt num_context, str context, SymInt? local_window, SymInt global_rows, "
    "SymInt global_columns, bool windowed_candidates, str whole) -> Tensor",
)


@_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Tensor:
    return q.new_empty(*q.shape[:2], v.shape[2])


def is_aligned(dtype: torch.dtype, *dims: int) -> bool:
    """Return whether the kernel takes heads of these dims; others go by way of whole sequences.

    In 16 bits they must be multiples of 16 (kernels/hstu_attention/_triton/align.py).
    """
    return dtype.itemsize > 2 or all(dim % 16 == 0 for dim in dims)


def cache_rows(pages_BG: Tensor, first_B: Tensor, count_B: Tensor, total: int) -> Tensor:
    """Return (total,) int64: rows of the cache of tokens first .. first + count - 1 of sequences.

    Args:
        pages_BG: (B, G) int32, as in CachedKeys.
        first_B: int64, a token of each sequence.
        count_B: int64, how many from there on.
        total: their sum, known to the host.
    """
    sequence_n = torch.repeat_interleave(
        torch.arange(count_B.numel(), device=count_B.device), count_B, output_size=total
    )
    start_B = count_B.cumsum(0) - count_B
    token_n = torch.arange(total, device=count_B.device) + (first_B - start_B)[sequence_n]
    page_n = pages_BG[sequence_n, token_n // PAGE].long()
    return page_n * PAGE + token_n % PAGE


def _gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    cached: CachedKeys,
    *,
    max_len: int,
    num_candidates: Tensor | None,
    bias: RelativeBias | None,
    **options: object,
) -> Tensor:
    """Return the attention by way of whole sequences, laid out side by side."""
    new_B = offsets.diff()
    whole = torch.zeros_like(offsets)
    whole[1:] = (cached.lengths + new_B).cumsum(0)
    num_cached = int(cached.lengths.sum())
    total = num_cached + len(q)
    rows_n = cache_rows(cached.pages, torch.zeros_like(cached.lengths), cached.lengths, num_cached)
    # Where each cached token, then each new one, stands in the whole.
    sequence = torch.arange(len(new_B), device=q.device)
    of_cached = torch.repeat_interleave(sequence, cached.lengths, output_size=num_cached)
    of_new = torch.repeat_interleave(sequence, new_B, output_size=len(q))
    before_B = cached.lengths.cumsum(0)
    to_cached = torch.arange(num_cached, device=q.device) + offsets[:-1][of_cached]
    to_new = torch.arange(len(q), device=q.device) + before_B[of_new]
    to = torch.cat([to_cached, to_new])

    def joined(old: Tensor, new: Tensor) -> Tensor:
        out = new.new_empty(total, *new.shape[1:])
        return out.index_copy_(0, to, torch.cat([old.index_select(0, rows_n), new]))

    if bias is not None and bias.time_table is not None:
        assert cached.time is not None
        assert bias.key_time is not None
        bias = RelativeBias(
            bias.position_table,
            bias.time_table,
            bias.query_time,
            joined(cached.time, bias.key_time),
        )
    return hstu_attention(
        q,
        joined(cached.k, k),
        joined(cached.v, v),
        whole,
        max_len=cached.max_len + max_len,
        num_candidates=num_candidates,
        q_offsets=offsets,
        max_q_len=max_len,
        bias=bias,
        **options,  # type: ignore[arg-type]
    )


def _check_cached(cached: CachedKeys, k: Tensor, v: Tensor, offsets: Tensor) -> None:
    for name, x, like in (("cached.k", cached.k, k), ("cached.v", cached.v, v)):
        if x.shape[1:] != like.shape[1:] or x.dtype != like.dtype or x.device != like.device:
            raise ValueError(
                f"{name} must be (C, {like.shape[1]}, {like.shape[2]}) {like.dtype} on "
                f"{like.device}, got {tuple(x.shape)} {x.dtype} on {x.device}"
            )
    if cached.k.shape[0] != cached.v.shape[0] or cached.k.shape[0] % PAGE:
        raise ValueError(
            f"cached.k and cached.v must have the same rows, a multiple of {PAGE}, got "
            f"{cached.k.shape[0]} and {cached.v.shape[0]}"
        )
    sequences = offsets.numel() - 1
    if cached.lengths.shape != (sequences,) or cached.pages.shape[0] != sequences:
        raise ValueError(
            f"cached.lengths and cached.pages must be of the {sequences} sequences of offsets, got "
            f"{tuple(cached.lengths.shape)} and {tuple(cached.pages.shape)}"
        )
    if cached.pages.shape[1] * PAGE < cached.max_len:
        raise ValueError(
            f"cached.pages holds {cached.pages.shape[1]} pages a sequence, too few for "
            f"cached.max_len={cached.max_len} tokens"
        )
