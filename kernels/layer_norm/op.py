"""Layer norm: the operator, its checks and its gradient."""

from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import Impl, resolve
from kernels.layer_norm import reference


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


@torch.library.custom_op("gr::layer_norm_bwd", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, has_bias: bool, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from kernels.layer_norm._triton import layer_norm_bwd

    weight = None if weight is None else weight.contiguous()
    return layer_norm_bwd(_rows(dy), _rows(x), weight, has_bias, mean, rstd)


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
