"""Sampled softmax: the operator, its checks and its gradient."""

from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import Impl, resolve
from kernels.sampled_softmax import reference


def sampled_softmax(
    query_RD: Tensor,
    positive_RD: Tensor,
    negative_ND: Tensor,
    query_offsets: Tensor,
    negative_offsets: Tensor,
    *,
    positive_id_R: Tensor,
    negative_id_N: Tensor,
    temperature: float,
    positive_log_q_R: Tensor | None = None,
    negative_log_q_N: Tensor | None = None,
    impl: Impl | str = Impl.AUTO,
) -> Tensor:
    """Return the loss of each positive against the negatives of its group.

        s_r = q_r . pos_r / T - log_q_r,   s_rn = q_r . neg_n / T - log_q_n
        loss_r = log(exp(s_r) + sum over n of the group of exp(s_rn)) - s_r

    A negative that is the positive of a row (same id) is left out of that row. A row without
    negatives has loss 0. Neither (R, N, D) nor (R, N) is ever stored.

    Args:
        query_RD: (R, D) floating, any row stride; rows of a group stand together.
        positive_RD: (R, D), dtype of query.
        negative_ND: (N, D), dtype of query; negatives of a group stand together.
        query_offsets: (G + 1,) int64: rows of group g are query_offsets[g]:query_offsets[g + 1].
        negative_offsets: (G + 1,) int64, of the negatives; groups may be empty.
        positive_id_R: (R,) int64.
        negative_id_N: (N,) int64.
        temperature: T, above 0.
        positive_log_q_R: (R,) floating, log of the sampling probability; None means 0. Constant.
        negative_log_q_N: (N,) floating; None means 0. Constant.
        impl: which implementation runs.

    Returns:
        (R,) float32 (float64 for float64).

    Raises:
        ValueError: if shapes, dtypes, devices or offsets do not fit (values of offsets are looked
            at on the CPU only), temperature is not above 0, or D is above 512 for Triton.

    Source: sampled softmax of 2402.17152, section 1.10 of its tables (T = 0.05, 128 negatives);
    accidental hits are removed as in the research code, by id.
    """
    _check_vectors(query_RD, positive_RD, negative_ND)
    R, N = query_RD.shape[0], negative_ND.shape[0]
    for name, offsets, size in (
        ("query_offsets", query_offsets, R),
        ("negative_offsets", negative_offsets, N),
    ):
        _check_offsets(name, offsets, size, query_RD.device)
    if query_offsets.numel() != negative_offsets.numel():
        raise ValueError(
            "query_offsets and negative_offsets must be of the same groups, got "
            f"{query_offsets.numel() - 1} and {negative_offsets.numel() - 1}"
        )
    for name, vector, size in (
        ("positive_id", positive_id_R, R),
        ("negative_id", negative_id_N, N),
        ("positive_log_q", positive_log_q_R, R),
        ("negative_log_q", negative_log_q_N, N),
    ):
        if vector is not None:
            _check_per_row(name, vector, size, query_RD.device)
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    arguments = (
        query_RD,
        positive_RD,
        negative_ND,
        query_offsets,
        negative_offsets,
        positive_id_R,
        negative_id_N,
        positive_log_q_R,
        negative_log_q_N,
        float(temperature),
    )
    if resolve(impl, query_RD) is Impl.REFERENCE:
        return reference.sampled_softmax(*arguments)
    _check_triton(query_RD)
    loss: Tensor = _forward(*arguments)[0]
    return loss


def _check_vectors(query_RD: Tensor, positive_RD: Tensor, negative_ND: Tensor) -> None:
    if query_RD.dim() != 2 or query_RD.shape[1] == 0 or not query_RD.is_floating_point():
        raise ValueError(f"query must be (R, D) floating with D > 0, got {_describe(query_RD)}")
    R, D = query_RD.shape
    if positive_RD.shape != (R, D):
        raise ValueError(f"positive must be ({R}, {D}) as query, got {_describe(positive_RD)}")
    if negative_ND.dim() != 2 or negative_ND.shape[1] != D:
        raise ValueError(f"negative must be (N, {D}), got {_describe(negative_ND)}")
    for name, x in (("positive", positive_RD), ("negative", negative_ND)):
        if x.dtype != query_RD.dtype or x.device != query_RD.device:
            raise ValueError(
                f"{name} must be {query_RD.dtype} on {query_RD.device} as query, got {_describe(x)}"
            )


def _check_offsets(name: str, offsets: Tensor, size: int, device: torch.device) -> None:
    if (
        offsets.dim() != 1
        or offsets.numel() == 0
        or offsets.dtype != torch.int64
        or offsets.device != device
    ):
        raise ValueError(f"{name} must be (G + 1,) int64 on {device}, got {_describe(offsets)}")
    if offsets.is_cuda or torch.compiler.is_compiling():
        return
    if int(offsets[0]) != 0 or int(offsets[-1]) != size or bool((offsets.diff() < 0).any()):
        raise ValueError(f"{name} must rise from 0 to {size}, got {offsets.tolist()[:20]}")


def _check_per_row(name: str, vector: Tensor, size: int, device: torch.device) -> None:
    fits = vector.dtype == torch.int64 if name.endswith("id") else vector.is_floating_point()
    if vector.shape != (size,) or not fits or vector.device != device:
        kind = "int64" if name.endswith("id") else "floating"
        raise ValueError(f"{name} must be ({size},) {kind} on {device}, got {_describe(vector)}")


def _check_triton(query_RD: Tensor) -> None:
    from kernels._triton.rows import check_rows
    from kernels.sampled_softmax._triton import MAX_DIM

    check_rows("query", query_RD.dtype, query_RD.shape[1])
    if query_RD.shape[1] > MAX_DIM:
        raise ValueError(
            f"query has D = {query_RD.shape[1]}, impl='triton' holds at most {MAX_DIM}: use "
            "impl='reference'"
        )


def _describe(x: Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype} on {x.device}"


def _rows(x: Tensor) -> Tensor:
    """Return x with contiguous columns; any row stride will do."""
    return x if x.stride(1) == 1 else x.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


@torch.library.custom_op("gr::sampled_softmax", mutates_args=())
def _forward(
    query: Tensor,
    positive: Tensor,
    negative: Tensor,
    query_offsets: Tensor,
    negative_offsets: Tensor,
    positive_id: Tensor,
    negative_id: Tensor,
    positive_log_q: Tensor | None,
    negative_log_q: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    from kernels.sampled_softmax._triton import sampled_softmax_fwd

    return sampled_softmax_fwd(
        _rows(query),
        _rows(positive),
        _rows(negative),
        query_offsets.contiguous(),
        negative_offsets.contiguous(),
        positive_id.contiguous(),
        negative_id.contiguous(),
        _contiguous(positive_log_q),
        _contiguous(negative_log_q),
        temperature,
    )


@_forward.register_fake
def _(
    query: Tensor,
    positive: Tensor,
    negative: Tensor,
    query_offsets: Tensor,
    negative_offsets: Tensor,
    positive_id: Tensor,
    negative_id: Tensor,
    positive_log_q: Tensor | None,
    negative_log_q: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    loss = query.new_empty(query.shape[0], dtype=torch.float32)
    return loss, torch.empty_like(loss)


@torch.library.custom_op("gr::sampled_softmax_bwd", mutates_args=())
def _backward(
    dloss: Tensor,
    query: Tensor,
    positive: Tensor,
    negative: Tensor,
    query_offsets: Tensor,
    negative_offsets: Tensor,
    positive_id: Tensor,
    negative_id: Tensor,
    negative_log_q: Tensor | None,
    loss: Tensor,
    lse: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from kernels.sampled_softmax._triton import sampled_softmax_bwd

    return sampled_softmax_bwd(
        dloss.contiguous(),
        _rows(query),
        _rows(positive),
        _rows(negative),
        query_offsets.contiguous(),
        negative_offsets.contiguous(),
        positive_id.contiguous(),
        negative_id.contiguous(),
        _contiguous(negative_log_q),
        loss,
        lse,
        temperature,
    )


@_backward.register_fake
def _(
    dloss: Tensor,
    query: Tensor,
    positive: Tensor,
    negative: Tensor,
    query_offsets: Tensor,
    negative_offsets: Tensor,
    positive_id: Tensor,
    negative_id: Tensor,
    negative_log_q: Tensor | None,
    loss: Tensor,
    lse: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        query.new_empty(query.shape),
        query.new_empty(query.shape),
        query.new_empty(negative.shape),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    # positive_log_q is in the sum of the exponentials.
    ctx.save_for_backward(*inputs[:7], inputs[8], *output)
    ctx.temperature = inputs[9]


def _gradients(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _backward(dloss, *ctx.saved_tensors, ctx.temperature)
    return (*gradients, *[None] * 7)


_forward.register_autograd(_gradients, setup_context=_save)
