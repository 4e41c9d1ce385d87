"""Gated norm: the operator, its checks and its gradient."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import Impl, resolve
from kernels.norm_gate import reference
from kernels.quantize import QuantizedRows, quantize_rows
from kernels.quantize.op import check_triton_rows


def norm_gate(
    x_LC: Tensor,
    u_LC: Tensor,
    weight_C: Tensor | None = None,
    bias_C: Tensor | None = None,
    *,
    num_groups: int = 1,
    eps: float = 1e-6,
    concat: bool = False,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    impl: Impl | str = Impl.AUTO,
) -> Tensor:
    """Return dropout(norm(x) * u): what the output projection of an HSTU layer reads.

    norm(x) = (x - mean) / sqrt(var + eps) * weight + bias; mean and var over all channels of a
    token, or over each of `num_groups` groups of neighbouring channels.

    Args:
        x_LC: (L, C) floating, any row stride: the attention output, heads side by side.
        u_LC: (L, C), dtype of x, any row stride (a view of the UVQK buffer will do).
        weight_C: (C,) floating, or None for 1.
        bias_C: (C,) floating, or None for 0.
        num_groups: 1 for a layer norm; H for a norm of each head. Divides C.
        eps: added to the variance.
        concat: return [u, x, norm(x) * u] side by side, as in DLRM-v3.
        dropout: probability in [0, 1) that an element of the output is zeroed; the others are
            divided by 1 - dropout.
        seed: one int64 on the device of x, needed for dropout. What is kept is a function of
            (seed, row, column), the same for every implementation.
        impl: which implementation runs.

    Returns:
        (L, C), or (L, 3 C) with `concat`; dtype of x.

    Raises:
        ValueError: if shapes, dtypes or devices do not agree, num_groups does not divide C, dropout
            is outside [0, 1), or it has no seed.

    Source: 2402.17152, eq. 3; `concat` and group norm as DLRM-v3 in generative-recommenders (there
    the group norm has one weight a head).
    """
    _check(x_LC, u_LC, weight_C, bias_C, num_groups, dropout, seed)
    if dropout == 0:
        seed = None
    arguments = (x_LC, u_LC, weight_C, bias_C, seed, num_groups, eps, concat, dropout)
    if resolve(impl, x_LC) is Impl.REFERENCE:
        return reference.norm_gate(*arguments)
    _check_triton(x_LC, num_groups)
    out: Tensor = _forward(*arguments)[0]
    return out


class NormGateFp8(NamedTuple):
    """What norm_gate_fp8 returns."""

    rows: QuantizedRows
    """The output in fp8."""
    out: Tensor | None
    """The output in the dtype of x, if it was asked for."""
    mean: Tensor
    """(L, 1) float32, for the backward pass."""
    rstd: Tensor
    """(L, 1) float32, for the backward pass."""


def norm_gate_fp8(
    x_LC: Tensor,
    u_LC: Tensor,
    weight_C: Tensor | None = None,
    bias_C: Tensor | None = None,
    *,
    eps: float = 1e-6,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    keep: bool = False,
    impl: Impl | str = Impl.AUTO,
) -> NormGateFp8:
    """Return norm_gate(x, u) as quantize_rows would, in the same pass; itself only if `keep`.

    It is rounded once, from float32. One group and no concat: a scale belongs to a whole row, so
    for the other forms quantise what norm_gate returns. Not differentiable: a layer that is made of
    such operators calls `norm_gate_backward` in its own backward pass.

    Args:
        x_LC: (L, C) float32, float16 or bfloat16, any row stride.
        u_LC: as in norm_gate.
        weight_C: as in norm_gate.
        bias_C: as in norm_gate.
        eps: added to the variance.
        dropout: as in norm_gate.
        seed: as in norm_gate.
        keep: also return the output in the dtype of x.
        impl: which implementation runs.

    Raises:
        ValueError: as norm_gate and quantize_rows.
    """
    _check(x_LC, u_LC, weight_C, bias_C, 1, dropout, seed)
    if dropout == 0:
        seed = None
    x_LC, u_LC = x_LC.detach(), u_LC.detach()
    vectors = (_detached(weight_C), _detached(bias_C), seed)
    if resolve(impl, x_LC) is Impl.REFERENCE:
        out, mean, rstd = reference.norm_gate_parts(x_LC, u_LC, *vectors, 1, eps, False, dropout)
        kept = out.to(x_LC.dtype) if keep else None
        return NormGateFp8(quantize_rows(out, impl=Impl.REFERENCE), kept, mean, rstd)
    check_triton_rows("x", x_LC, x_LC.shape[1])
    q, scale, out, mean, rstd = _forward_fp8(x_LC, u_LC, *vectors, eps, dropout, keep)
    return NormGateFp8(QuantizedRows(q, scale), out if keep else None, mean, rstd)


def norm_gate_backward(
    dout: Tensor,
    x_LC: Tensor,
    u_LC: Tensor,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    seed: Tensor | None,
    mean_LG: Tensor,
    rstd_LG: Tensor,
    *,
    num_groups: int = 1,
    concat: bool = False,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dx and du (dtype of x), dweight and dbias (float32, zero where none); in Triton.

    Args:
        dout: (L, C or 3 C) gradient of the output.
        x_LC: as in norm_gate, like the others.
        u_LC: as in norm_gate.
        weight_C: as in norm_gate.
        bias_C: as in norm_gate.
        seed: as in norm_gate.
        mean_LG: as the forward pass returned it.
        rstd_LG: as the forward pass returned it.
        num_groups: as in norm_gate.
        concat: as in norm_gate.
        dropout: as in norm_gate.
    """
    tensors = (dout, x_LC, u_LC, weight_C, bias_C, seed, mean_LG, rstd_LG)
    found: tuple[Tensor, Tensor, Tensor, Tensor] = _backward(*tensors, num_groups, concat, dropout)
    return found


def _check(
    x_LC: Tensor,
    u_LC: Tensor,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    num_groups: int,
    dropout: float,
    seed: Tensor | None,
) -> None:
    if x_LC.dim() != 2 or x_LC.shape[1] == 0 or not x_LC.is_floating_point():
        raise ValueError(
            f"x must be (L, C) floating with C > 0, got {tuple(x_LC.shape)} {x_LC.dtype}"
        )
    if u_LC.shape != x_LC.shape or u_LC.dtype != x_LC.dtype or u_LC.device != x_LC.device:
        raise ValueError(
            f"u must be as x, {tuple(x_LC.shape)} {x_LC.dtype} on {x_LC.device}; got "
            f"{tuple(u_LC.shape)} {u_LC.dtype} on {u_LC.device}"
        )
    C = x_LC.shape[1]
    for name, vector in (("weight", weight_C), ("bias", bias_C)):
        if vector is None:
            continue
        if vector.shape != (C,) or not vector.is_floating_point() or vector.device != x_LC.device:
            raise ValueError(
                f"{name} must be ({C},) floating on {x_LC.device}, got {tuple(vector.shape)} "
                f"{vector.dtype} on {vector.device}"
            )
    if num_groups < 1 or C % num_groups:
        raise ValueError(f"num_groups must divide the {C} channels of x, got {num_groups}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    if dropout > 0 and (
        seed is None or seed.numel() != 1 or seed.dtype != torch.int64 or seed.device != x_LC.device
    ):
        found = "None" if seed is None else f"{tuple(seed.shape)} {seed.dtype} on {seed.device}"
        raise ValueError(f"dropout needs a seed: one int64 on {x_LC.device}, got {found}")


def _check_triton(x_LC: Tensor, num_groups: int) -> None:
    from kernels._triton.rows import check_rows

    check_rows("x", x_LC.dtype, x_LC.shape[1] // num_groups)


def _rows(x_LC: Tensor) -> Tensor:
    """Return x with contiguous columns; any row stride will do."""
    return x_LC if x_LC.stride(1) == 1 else x_LC.contiguous()


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


@torch.library.custom_op("gr::norm_gate", mutates_args=())
def _forward(
    x: Tensor,
    u: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    num_groups: int,
    eps: float,
    concat: bool,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from kernels.norm_gate._triton import norm_gate_fwd

    vectors = (_contiguous(weight), _contiguous(bias), seed)
    return norm_gate_fwd(_rows(x), _rows(u), *vectors, num_groups, eps, concat, dropout)


@_forward.register_fake
def _(
    x: Tensor,
    u: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    num_groups: int,
    eps: float,
    concat: bool,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    L, C = x.shape
    per_group = x.new_empty(L, num_groups, dtype=torch.float32)
    return x.new_empty(L, 3 * C if concat else C), per_group, torch.empty_like(per_group)


@torch.library.custom_op("gr::norm_gate_fp8", mutates_args=())
def _forward_fp8(
    x: Tensor,
    u: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from kernels.norm_gate._triton import norm_gate_fp8_fwd

    vectors = (_contiguous(weight), _contiguous(bias), seed)
    return norm_gate_fp8_fwd(_rows(x), _rows(u), *vectors, eps, dropout, keep)


@_forward_fp8.register_fake
def _(
    x: Tensor,
    u: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    L, C = x.shape
    mean, rstd = (x.new_empty(L, 1, dtype=torch.float32) for _ in range(2))
    q = x.new_empty(L, C, dtype=torch.float8_e4m3fn)
    scale = x.new_empty(L, dtype=torch.float32)
    return q, scale, x.new_empty(L if keep else 0, C), mean, rstd


@torch.library.custom_op("gr::norm_gate_bwd", mutates_args=())
def _backward(
    dout: Tensor,
    x: Tensor,
    u: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    concat: bool,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from kernels.norm_gate._triton import norm_gate_bwd

    vectors = (_contiguous(weight), _contiguous(bias), seed, mean, rstd)
    return norm_gate_bwd(_rows(dout), _rows(x), _rows(u), *vectors, num_groups, concat, dropout)


@_backward.register_fake
def _(
    dout: Tensor,
    x: Tensor,
    u: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    concat: bool,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sums = x.new_empty(x.shape[1], dtype=torch.float32)
    return x.new_empty(x.shape), u.new_empty(u.shape), sums, torch.empty_like(sums)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, u, weight, bias, seed, num_groups, _, concat, dropout = inputs
    ctx.save_for_backward(x, u, weight, bias, seed, *output[1:])
    ctx.options = (num_groups, concat, dropout)


def _gradients(ctx: Any, dout: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    _, _, weight, bias, *_ = ctx.saved_tensors
    dx, du, dweight, dbias = _backward(dout, *ctx.saved_tensors, *ctx.options)
    return (
        dx,
        du,
        None if weight is None else dweight.to(weight.dtype),
        None if bias is None else dbias.to(bias.dtype),
        *[None] * 5,
    )


_forward.register_autograd(_gradients, setup_context=_save)
