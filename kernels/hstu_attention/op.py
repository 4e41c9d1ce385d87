"""The operator: arguments, their checks, and the choice of implementation.

Letters: B sequences, L tokens (keys), R queries, H heads, K dim of q and k, V dim of v.
"""

from typing import Literal

import torch
from torch import Tensor

from kernels.dispatch import Impl, resolve
from kernels.hstu_attention import reference
from kernels.hstu_attention.bias import RelativeBias
from kernels.hstu_attention.mask import AttentionMask

Activation = Literal["silu", "softmax"]


def hstu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    max_len: int,
    alpha: float,
    scaling_length: float | None,
    activation: Activation = "silu",
    mask: AttentionMask = AttentionMask(),  # noqa: B008 (immutable)
    num_candidates: Tensor | None = None,
    q_offsets: Tensor | None = None,
    max_q_len: int | None = None,
    bias: RelativeBias | None = None,
    deterministic: bool = False,
    impl: Impl | str = Impl.AUTO,
) -> Tensor:
    """Return the attention of each query over the visible keys of its sequence.

        silu:     A = silu(alpha * q k + bias) / scaling_length, zero where hidden;  out = A v
        softmax:  A = softmax over the visible keys of alpha * q k + bias;           out = A v

    Queries are the last q_offsets[b + 1] - q_offsets[b] tokens of sequence b. The result of a
    sequence does not depend on the others of the batch.

    Args:
        q: (R, H, K) floating.
        k: (L, H, K), dtype of q. May be a strided view, as may q and v.
        v: (L, H, V), dtype of q.
        offsets: (B + 1,) int64, on the device of q: tokens of sequence b are
            offsets[b]:offsets[b + 1]. Its contents are checked where they lie in host memory only:
            the GPU is not waited for.
        max_len: at least the longest sequence.
        alpha: factor of q k.
        scaling_length: divisor of the SiLU weights, above 0. None with softmax.
        activation: what makes weights of scores.
        mask: which keys a query sees.
        num_candidates: (B,) int64, candidates at the end of each sequence. None means none.
        q_offsets: (B + 1,) int64: queries of sequence b are q_offsets[b]:q_offsets[b + 1], at most
            as many as its tokens. None means every token.
        max_q_len: at least the most queries of a sequence. None means max_len.
        bias: added to alpha * q k.
        deterministic: the same bits for the same input, gradients included. The reference gives
            them on a CPU in any case.
        impl: which implementation.

    Returns:
        (R, H, V), dtype of q.

    Raises:
        ValueError: if an argument does not fit the others, naming it.

    Source: HSTU (arXiv 2402.17152) equation 2; scaling by a fixed length and alpha as in DLRM-v3 of
        meta-recsys/generative-recommenders, which divides by the longest sequence of the batch.
    """
    if q_offsets is None:
        q_offsets = offsets
    if max_q_len is None:
        max_q_len = max_len
    if num_candidates is None:
        num_candidates = offsets.new_zeros(max(offsets.numel() - 1, 0))
    _check_tensors(q, k, v, offsets, q_offsets, num_candidates)
    _check_scaling(activation, scaling_length)
    if bias is not None:
        _check_bias(bias, q, k)
    if not (offsets.is_cuda or torch.compiler.is_compiling()):
        _check_lengths(
            offsets, q_offsets, num_candidates, k.shape[0], q.shape[0], max_len, max_q_len
        )
    if resolve(impl, q) is Impl.TRITON and impl != Impl.AUTO:
        raise ValueError("impl='triton': hstu_attention has the reference implementation only")
    return reference.hstu_attention(
        q,
        k,
        v,
        offsets,
        max_len=max_len,
        alpha=alpha,
        scaling_length=scaling_length,
        activation=activation,
        mask=mask,
        num_candidates=num_candidates,
        q_offsets=q_offsets,
        max_q_len=max_q_len,
        bias=bias,
    )


def _check_tensors(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, q_offsets: Tensor, num_candidates: Tensor
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3 or not x.is_floating_point():
            raise ValueError(
                f"{name} must be a floating tensor (tokens, heads, dim), got {_describe(x)}"
            )
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"q, k and v must share dtype and device; q is {_describe(q)}, "
                f"{name} {_describe(x)}"
            )
    if k.shape[1:] != q.shape[1:]:
        raise ValueError(
            f"k must have the heads and the dim of q, got k {tuple(k.shape)} and q {tuple(q.shape)}"
        )
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"v must have the tokens and the heads of k, got v {tuple(v.shape)} and "
            f"k {tuple(k.shape)}"
        )
    for name, x in (
        ("offsets", offsets),
        ("q_offsets", q_offsets),
        ("num_candidates", num_candidates),
    ):
        if x.dim() != 1 or x.dtype != torch.int64 or x.device != q.device:
            raise ValueError(
                f"{name} must be a 1-D int64 tensor on the device of q, {q.device}, "
                f"got {_describe(x)}"
            )
    if offsets.numel() < 1:
        raise ValueError("offsets must hold B + 1 values, got none")
    if q_offsets.numel() != offsets.numel():
        raise ValueError(
            f"q_offsets must hold as many values as offsets, got {q_offsets.numel()} and "
            f"{offsets.numel()}"
        )
    if num_candidates.numel() != offsets.numel() - 1:
        raise ValueError(
            f"num_candidates must hold one value for each of the {offsets.numel() - 1} sequences, "
            f"got {num_candidates.numel()}"
        )


def _check_scaling(activation: str, scaling_length: float | None) -> None:
    if activation not in ("silu", "softmax"):
        raise ValueError(f"activation must be 'silu' or 'softmax', got {activation!r}")
    if activation == "silu" and (scaling_length is None or not scaling_length > 0):
        raise ValueError(
            f"scaling_length must be above 0 with activation='silu', got {scaling_length}"
        )
    if activation == "softmax" and scaling_length is not None:
        raise ValueError(
            f"softmax divides by its own sum: scaling_length must be None, got {scaling_length}"
        )


def _check_bias(bias: RelativeBias, q: Tensor, k: Tensor) -> None:
    table = bias.position_table
    if table.dim() != 1 or table.numel() % 2 == 0 or not table.is_floating_point():
        raise ValueError(
            f"bias.position_table must be floating, (2 * M - 1,), got {_describe(table)}"
        )
    times = {"bias.query_time": (bias.query_time, q), "bias.key_time": (bias.key_time, k)}
    if bias.time_table is None:
        given = [name for name, (time, _) in times.items() if time is not None]
        if given:
            raise ValueError(f"{' and '.join(given)} would be ignored: bias.time_table is None")
        return
    if (
        bias.time_table.dim() != 1
        or bias.time_table.numel() == 0
        or not bias.time_table.is_floating_point()
    ):
        raise ValueError(
            f"bias.time_table must be floating, (T + 1,), got {_describe(bias.time_table)}"
        )
    for name, (time, like) in times.items():
        if time is None:
            raise ValueError(f"bias.time_table needs {name}, got None")
        if time.shape != like.shape[:1] or time.dtype != torch.int64:
            raise ValueError(f"{name} must be int64, ({like.shape[0]},), got {_describe(time)}")


def _check_lengths(
    offsets: Tensor,
    q_offsets: Tensor,
    num_candidates: Tensor,
    num_keys: int,
    num_queries: int,
    max_len: int,
    max_q_len: int,
) -> None:
    for name, x, total, longest, limit in (
        ("offsets", offsets, num_keys, "max_len", max_len),
        ("q_offsets", q_offsets, num_queries, "max_q_len", max_q_len),
    ):
        if x[0] != 0 or x[-1] != total:
            raise ValueError(
                f"{name} must begin with 0 and end with the number of rows, {total}, "
                f"got {int(x[0])} and {int(x[-1])}"
            )
        lengths = x.diff()
        if lengths.numel() and lengths.min() < 0:
            raise ValueError(f"{name} must not fall, got a step of {int(lengths.min())}")
        if lengths.numel() and lengths.max() > limit:
            raise ValueError(
                f"{longest} must be at least the largest step of {name}, {int(lengths.max())}, "
                f"got {limit}"
            )
    for name, x in (("q_offsets", q_offsets.diff()), ("num_candidates", num_candidates)):
        if bool((x > offsets.diff()).any()) or bool((x < 0).any()):
            b = int(((x > offsets.diff()) | (x < 0)).nonzero()[0])
            raise ValueError(
                f"{name} must give each sequence between 0 and its number of tokens, "
                f"got {int(x[b])} for sequence {b} of {int(offsets.diff()[b])} tokens"
            )


def _describe(x: Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype} on {x.device}"
