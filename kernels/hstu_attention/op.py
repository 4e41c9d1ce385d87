"""The operator: arguments, their checks, and the choice of implementation.

Letters: B sequences, L tokens (keys), R queries, H heads, K dim of q and k, V dim of v.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dispatch import Impl, resolve
from kernels.hstu_attention import reference
from kernels.hstu_attention.arguments import (
    check_bias,
    check_lengths,
    check_scaling,
    check_supported,
    check_tensors,
    not_hopper,
)
from kernels.hstu_attention.bias import RelativeBias
from kernels.hstu_attention.mask import AttentionMask
from kernels.hstu_attention.structure import SCHEMA, Structure, structure_of

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
        deterministic: the same bits for the same input, gradients included. The Triton kernels give
            them in any case, as does the reference on a CPU; for the reference on a GPU set
            torch.use_deterministic_algorithms.
        impl: TRITON takes float32, float16 or bfloat16, K and V up to 256. HOPPER takes float16 or
            bfloat16, SiLU, K and V of 32, 64, 128 or 256. It copies q, k or v where rows do not
            begin at multiples of 16 bytes or the heads of a row do not follow each other, and
            counts times more than 34 years from the newest key of a sequence as 34 years from it.

    Returns:
        (R, H, V), dtype of q.

    Raises:
        ValueError: if an argument does not fit the others, or the implementation, naming it.

    Source: HSTU (arXiv 2402.17152) equation 2; scaling by a fixed length and alpha as in DLRM-v3 of
        meta-recsys/generative-recommenders, which divides by the longest sequence of the batch.
    """
    if q_offsets is None:
        q_offsets = offsets
    if max_q_len is None:
        max_q_len = max_len
    check_tensors(q, k, v, offsets, q_offsets, num_candidates)
    check_scaling(activation, scaling_length)
    if bias is not None:
        check_bias(bias, q, k)
    if not (offsets.is_cuda or torch.compiler.is_compiling()):
        check_lengths(
            offsets,
            q_offsets,
            num_candidates,
            num_keys=k.shape[0],
            num_queries=q.shape[0],
            max_len=max_len,
            max_q_len=max_q_len,
        )
    softmax = activation == "softmax"
    implementation = resolve(impl, q, not_hopper=not_hopper(q, v, softmax=softmax))
    if implementation is Impl.REFERENCE:
        if num_candidates is None:
            num_candidates = torch.zeros_like(offsets[1:])
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
    check_supported(q, v)
    # The kernels take any stride but for the last dim.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    structure = structure_of(
        offsets,
        q_offsets,
        num_candidates,
        bias,
        mask,
        max_len=max_len,
        max_q_len=max_q_len,
        alpha=alpha,
        scaling_length=scaling_length,
        softmax=softmax,
        hopper=implementation is Impl.HOPPER,
        deterministic=deterministic,
    )
    if type(q) is Tensor and not torch.compiler.is_compiling():
        # The same, without the registered operator: it takes 0.2 ms of a processor a call.
        return _Attention.apply(q, k, v, *structure)[0]  # type: ignore[no-any-return, no-untyped-call]
    out: Tensor = _forward(q, k, v, *structure)[0]
    return out


def _run_forward(q: Tensor, k: Tensor, v: Tensor, *structure: Any) -> tuple[Tensor, Tensor]:
    call = Structure(*structure)
    if call.hopper:
        from kernels.hstu_attention import _hopper  # the reference needs no Triton

        q, k, v = (_hopper.copyable(x) for x in (q, k, v))
        return _hopper.hstu_attention_fwd(q, k, v, call), q.new_empty(0, dtype=torch.float32)
    from kernels.hstu_attention._triton import hstu_attention_fwd

    return hstu_attention_fwd(q, k, v, call)


_forward = torch.library.custom_op(
    "gr::hstu_attention",
    _run_forward,
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {SCHEMA}) -> (Tensor, Tensor)",
)


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *structure: Any) -> tuple[Tensor, Tensor]:
    R, H, _ = q.shape
    lse_shape = (R, H) if Structure(*structure).softmax else (0,)
    return q.new_empty(R, H, v.shape[2]), q.new_empty(lse_shape, dtype=torch.float32)


def _run_backward(
    dout: Tensor,
    out: Tensor | None,
    lse: Tensor,
    needs_bias_grad: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *structure: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    args = (dout, out, lse, needs_bias_grad, q, k, v, Structure(*structure))
    return run_backward(*args, rounds=True)[0]


def run_backward(
    dout: Tensor,
    out: Tensor | None,
    lse: Tensor,
    needs_bias_grad: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Structure,
    *,
    rounds: bool,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], float]:
    """Return the gradients of q, k, v and of both tables, and what dQ is still to be multiplied by.

    Args:
        dout: (R, H, V), like the rest as the registered operator takes it.
        out: with softmax.
        lse: with softmax.
        needs_bias_grad: whether to compute those of the tables.
        q: (R, H, K).
        k: (L, H, K).
        v: (L, H, V).
        call: everything else.
        rounds: whether dQ must be in the dtype of q, times 1. Else it may come as sums in float32
            and a factor, for a caller who reads it once anyway.
    """
    if not call.hopper:
        from kernels.hstu_attention._triton import hstu_attention_bwd

        return hstu_attention_bwd(dout, out, lse, needs_bias_grad, q, k, v, call), 1.0
    from kernels.hstu_attention import _hopper

    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    q, k, v = (_hopper.copyable(x) for x in (q, k, v))
    dq, factor, dposition, dtime = _hopper.hstu_attention_bwd(
        dout, q, k, v, call, (dk, dv), call.deterministic, needs_bias_grad, rounds=rounds
    )
    return (dq, dk, dv, dposition, dtime), factor


_backward = torch.library.custom_op(
    "gr::hstu_attention_bwd",
    _run_backward,
    mutates_args=(),
    schema=f"(Tensor dout, Tensor? out, Tensor lse, bool needs_bias_grad, Tensor q, Tensor k, "
    f"Tensor v, {SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_backward.register_fake
def _(
    dout: Tensor,
    out: Tensor | None,
    lse: Tensor,
    needs_bias_grad: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *structure: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tables = Structure(*structure).position_table, Structure(*structure).time_table
    dposition, dtime = (
        q.new_empty(0) if table is None or not needs_bias_grad else torch.empty_like(table)
        for table in tables
    )
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dposition, dtime


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    structure = Structure(*inputs[3:])
    ctx.options = structure[_NUM_TENSORS:]
    ctx.set_materialize_grads(False)
    out, lse = output
    # Only softmax reads its output again.
    ctx.save_for_backward(
        out if structure.softmax else None, lse, *inputs[:3], *structure[:_NUM_TENSORS]
    )


def _differentiate(
    ctx: Any, dout: Tensor, dlse: None, backward: Callable[..., Any] = _backward
) -> tuple[Any, ...]:
    out, lse, q, k, v, *tensors = ctx.saved_tensors
    structure = Structure(*tensors, *ctx.options)
    needs = Structure(*ctx.needs_input_grad[3:])
    needs_bias_grad = bool(needs.position_table or needs.time_table)
    dq, dk, dv, dposition, dtime = backward(
        dout.contiguous(), out, lse, needs_bias_grad, q, k, v, *structure
    )
    grads: dict[str, Tensor | None] = dict.fromkeys(Structure._fields)
    grads["position_table"] = dposition if needs.position_table else None
    grads["time_table"] = dtime if needs.time_table else None
    return dq, dk, dv, *grads.values()


class _Attention(torch.autograd.Function):
    """The registered operator without its registration."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, *structure: Any
    ) -> tuple[Tensor, Tensor]:
        output = _run_forward(q, k, v, *structure)
        ctx.mark_non_differentiable(output[1])
        _save(ctx, (q, k, v, *structure), output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dlse: None) -> tuple[Any, ...]:
        return _differentiate(ctx, dout, dlse, _run_backward)


_NUM_TENSORS = Structure._fields.index("max_len")
_forward.register_autograd(_differentiate, setup_context=_save)
