"""Layer norm: the operator, its checks and its gradient."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import Impl, resolve
from kernels.layer_norm import reference
from kernels.quantize import QuantizedRows, quantize_rows
from kernels.quantize.op import check_triton_rows


def layer_norm(
    x_LD: Tensor,
    weight_D: Tensor | None = None,
    bias_D: Tensor | None = None,
    *,
    eps: float = 1e-6,
    impl: Impl | str = Impl.AUTO,
) -> Tensor:
    """Return each row of x with zero mean and unit variance, scaled and shifted.

    y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, in float32 (float64 for float64).

    Args:
        x_LD: (L, D) floating, any row stride; L may be 0.
        weight_D: (D,) floating, or None for 1.
        bias_D: (D,) floating, or None for 0.
        eps: added to the variance.
        impl: which implementation runs.

    Returns:
        (L, D), dtype of x.

    Raises:
        ValueError: if shapes, dtypes or devices do not agree, or D is 0 or (Triton) above 16384.

    Source: Ba et al. 2016 (1607.06450), eq. 4; non-affine with eps 1e-6 as in the HSTU code.
    """
    _check(x_LD, weight_D, bias_D)
    if resolve(impl, x_LD) is Impl.REFERENCE:
        return reference.layer_norm(x_LD, weight_D, bias_D, eps)
    _check_triton(x_LD)
    y_LD: Tensor = _forward(x_LD, weight_D, bias_D, eps)[0]
    return y_LD


class LayerNormFp8(NamedTuple):
    """What layer_norm_fp8 returns."""

    rows: QuantizedRows
    """y in fp8."""
    y: Tensor | None
    """y in the dtype of x, if it was asked for."""
    mean: Tensor
    """(L,) float32, for the backward pass."""
    rstd: Tensor
    """(L,) float32, for the backward pass."""


def layer_norm_fp8(
    x_LD: Tensor,
    weight_D: Tensor | None = None,
    bias_D: Tensor | None = None,
    *,
    eps: float = 1e-6,
    keep: bool = False,
    impl: Impl | str = Impl.AUTO,
) -> LayerNormFp8:
    """Return layer_norm(x) as quantize_rows would, in the same pass; y itself only if `keep`.

    It is rounded once, from float32. Not differentiable: a layer that is made of such operators
    calls `layer_norm_backward` in its own backward pass.

    Args:
        x_LD: (L, D) float32, float16 or bfloat16, any row stride.
        weight_D: as in layer_norm.
        bias_D: as in layer_norm.
        eps: added to the variance.
        keep: also return y in the dtype of x.
        impl: which implementation runs.

    Raises:
        ValueError: as layer_norm and quantize_rows.
    """
    _check(x_LD, weight_D, bias_D)
    x_LD = x_LD.detach()
    weight_D = None if weight_D is None else weight_D.detach()
    bias_D = None if bias_D is None else bias_D.detach()
    if resolve(impl, x_LD) is Impl.REFERENCE:
        y, mean, rstd = reference.layer_norm_parts(x_LD, weight_D, bias_D, eps)
        kept = y.to(x_LD.dtype) if keep else None
        return LayerNormFp8(quantize_rows(y, impl=Impl.REFERENCE), kept, mean, rstd)
    check_triton_rows("x", x_LD, x_LD.shape[1])
    q, scale, y, mean, rstd = _forward_fp8(x_LD, weight_D, bias_D, eps, keep)
    return LayerNormFp8(QuantizedRows(q, scale), y if keep else None, mean, rstd)


def layer_norm_backward(
    dy_LD: Tensor,
    x_LD: Tensor,
    weight_D: Tensor | None,
    has_bias: bool,
    mean_L: Tensor,
    rstd_L: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx (dtype of x), dweight and dbias (float32, zero where there is none); in Triton.

    Args:
        dy_LD: (L, D) gradient of y.
        x_LD: what was normed.
        weight_D: (D,) or None.
        has_bias: whether dbias is wanted.
        mean_L: as layer_norm_fp8 returned it.
        rstd_L: as layer_norm_fp8 returned it.
    """
    found: tuple[Tensor, Tensor, Tensor] = _backward(
        dy_LD, x_LD, weight_D, has_bias, mean_L, rstd_L
    )
    return found


def _check_triton(x_LD: Tensor) -> None:
    from kernels._triton.rows import check_rows

    check_rows("x", x_LD.dtype, x_LD.shape[1])


def _check(x_LD: Tensor, weight_D: Tensor | None, bias_D: Tensor | None) -> None:
    if x_LD.dim() != 2 or x_LD.shape[1] == 0 or not x_LD.is_floating_point():
        raise ValueError(
            f"x must be (L, D) floating with D > 0, got {tuple(x_LD.shape)} {x_LD.dtype}"
        )
    for name, vector in (("weight", weight_D), ("bias", bias_D)):
        if vector is None:
            continue
        if vector.shape != x_LD.shape[1:] or not vector.is_floating_point():
            raise ValueError(
                f"{name} must be ({x_LD.shape[1]},) floating as the rows of x, got "
                f"{tuple(vector.shape)} {vector.dtype}"
            )
        if vector.device != x_LD.device:
            raise ValueError(f"{name} must be on {x_LD.device} as x is, got {vector.device}")


def _rows(x_LD: Tensor) -> Tensor:
    """Return x with contiguous columns; any row stride will do."""
    return x_LD if x_LD.stride(1) == 1 else x_LD.contiguous()


@torch.library.custom_op("gr::layer_norm", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    from kernels.layer_norm._triton import layer_norm_fwd

    weight = None if weight is None else weight.contiguous()
    return layer_norm_fwd(_rows(x), weight, None if bias is None else bias.contiguous(), eps)


@_forward.register_fake
def _(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    per_row = x.new_empty(x.shape[0], dtype=torch.float32)
    return x.new_empty(x.shape), per_row, torch.empty_like(per_row)


@torch.library.custom_op("gr::layer_norm_fp8", mutates_args=())
def _forward_fp8(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from kernels.layer_norm._triton import layer_norm_fp8_fwd

    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    return layer_norm_fp8_fwd(_rows(x), weight, bias, eps, keep)


@_forward_fp8.register_fake
def _(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    L, D = x.shape
    scale, mean, rstd = (x.new_empty(L, dtype=torch.float32) for _ in range(3))
    q = x.new_empty(L, D, dtype=torch.float8_e4m3fn)
    return q, scale, x.new_empty(L if keep else 0, D), mean, rstd


@torch.library.custom_op("gr::layer_norm_bwd", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, has_bias: bool, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from kernels.layer_norm._triton import layer_norm_bwd

    weight = None if weight is None else weight.contiguous()
    return layer_norm_bwd(_rows(dy), _rows(x), weight, has_bias, mean, rstd)[:3]


@_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor | None, has_bias: bool, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    sums = x.new_empty(x.shape[1], dtype=torch.float32)
    return x.new_empty(x.shape), sums, torch.empty_like(sums)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _ = inputs
    ctx.save_for_backward(x, weight, *output[1:])
    ctx.weight_dtype = None if weight is None else weight.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, mean, rstd = ctx.saved_tensors
    dx, dweight, dbias = _backward(dy, x, weight, ctx.bias_dtype is not None, mean, rstd)
    return (
        dx,
        dweight.to(ctx.weight_dtype) if weight is not None else None,
        dbias.to(ctx.bias_dtype) if ctx.bias_dtype is not None else None,
        None,
    )


_forward.register_autograd(_gradients, setup_context=_save)
