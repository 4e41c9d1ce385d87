"""Linear map with an epilogue: the operator, its checks and its gradient."""

from typing import Any, Literal

import torch
from torch import Tensor

from kernels.dispatch import Impl, resolve
from kernels.linear import reference


def linear(
    x_LD: Tensor,
    weight_FD: Tensor,
    bias_F: Tensor | None = None,
    *,
    activation: Literal["none", "silu"] = "none",
    silu_columns: int | None = None,
    residual_LF: Tensor | None = None,
    impl: Impl | str = Impl.AUTO,
) -> Tensor:
    """Return x W^T + b, with SiLU applied or a residual added before it is stored.

    16-bit products are summed in float32 and rounded once, after the epilogue; float32 products are
    torch's (IEEE, unless torch is told to use TF32). With SiLU, z = x W^T + b is
    kept for the backward pass in the dtype of x.

    Args:
        x_LD: (L, D) floating, any row stride.
        weight_FD: (F, D), dtype of x.
        bias_F: (F,) floating, or None.
        activation: silu returns z * sigmoid(z).
        silu_columns: silu on so many first columns only, 1 .. F (U of a UVQK projection). None
            means all. With silu only.
        residual_LF: (L, F), dtype of x, any row stride: added last. Not with silu.
        impl: which implementation runs.

    Returns:
        (L, F), dtype of x.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit, the activation is unknown,
            silu_columns is outside 1 .. F or without silu, or silu has a residual.

    Source: the projections of an HSTU layer, 2402.17152, eq. 1 and 3; the residual as a bias of two
    dims as in 2602.16986.
    """
    _check(x_LD, weight_FD, bias_F, activation, residual_LF)
    columns = _silu_columns(activation, silu_columns, weight_FD.shape[0])
    if resolve(impl, x_LD) is Impl.REFERENCE:
        return reference.linear(x_LD, weight_FD, bias_F, residual_LF, columns)
    if x_LD.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"x must be float32, float16 or bfloat16 for impl='triton', got {x_LD.dtype}: use "
            "impl='reference'"
        )
    learns = any(t is not None and t.requires_grad for t in (x_LD, weight_FD, bias_F))
    keep = columns > 0 and learns and torch.is_grad_enabled()
    y_LF: Tensor = _forward(x_LD, weight_FD, bias_F, residual_LF, columns, keep)[0]
    return y_LF


def _silu_columns(activation: str, silu_columns: int | None, F: int) -> int:
    """Return how many first columns SiLU is applied to."""
    if activation == "none":
        if silu_columns is not None:
            raise ValueError(f"silu_columns={silu_columns} would be ignored: activation is 'none'")
        return 0
    if silu_columns is None:
        return F
    if not 1 <= silu_columns <= F:
        raise ValueError(f"silu_columns must be in 1 .. {F}, got {silu_columns}")
    return silu_columns


def _check(
    x_LD: Tensor,
    weight_FD: Tensor,
    bias_F: Tensor | None,
    activation: str,
    residual_LF: Tensor | None,
) -> None:
    if x_LD.dim() != 2 or x_LD.shape[1] == 0 or not x_LD.is_floating_point():
        raise ValueError(f"x must be (L, D) floating with D > 0, got {_describe(x_LD)}")
    if activation not in ("none", "silu"):
        raise ValueError(f"activation must be none or silu, got {activation!r}")
    if activation == "silu" and residual_LF is not None:
        raise ValueError("activation='silu' and a residual exclude each other: add it afterwards")
    L, D = x_LD.shape
    if weight_FD.dim() != 2 or weight_FD.shape[1] != D or weight_FD.shape[0] == 0:
        raise ValueError(f"weight must be (F, {D}) with F > 0, got {_describe(weight_FD)}")
    F = weight_FD.shape[0]
    if bias_F is not None and (bias_F.shape != (F,) or not bias_F.is_floating_point()):
        raise ValueError(f"bias must be ({F},) floating, got {_describe(bias_F)}")
    if residual_LF is not None and residual_LF.shape != (L, F):
        raise ValueError(f"residual must be ({L}, {F}), got {_describe(residual_LF)}")
    for name, tensor in (("weight", weight_FD), ("residual", residual_LF)):
        if tensor is not None and tensor.dtype != x_LD.dtype:
            raise ValueError(f"{name} must be {x_LD.dtype} as x is, got {tensor.dtype}")
    for name, tensor in (("weight", weight_FD), ("bias", bias_F), ("residual", residual_LF)):
        if tensor is not None and tensor.device != x_LD.device:
            raise ValueError(f"{name} must be on {x_LD.device} as x is, got {tensor.device}")


def _describe(x: Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype}"


def _rows(x: Tensor) -> Tensor:
    """Return x with contiguous columns; any row stride will do."""
    return x if x.stride(1) == 1 else x.contiguous()


@torch.library.custom_op("gr::linear", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    silu_columns: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    from kernels.linear._triton import linear_fwd

    return linear_fwd(
        _rows(x),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        None if residual is None else _rows(residual),
        silu_columns,
        keep,
    )


@_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    silu_columns: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    L, F = x.shape[0], weight.shape[0]
    return x.new_empty(L, F), x.new_empty(L if keep else 0, F)


@torch.library.custom_op("gr::silu_bwd", mutates_args=())
def _silu_backward(dy: Tensor, z: Tensor, silu_columns: int) -> tuple[Tensor, Tensor]:
    from kernels.linear._triton import silu_bwd

    return silu_bwd(_rows(dy), z, silu_columns)


@_silu_backward.register_fake
def _(dy: Tensor, z: Tensor, silu_columns: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(z), z.new_empty(z.shape[1], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, _, silu_columns, keep = inputs
    if silu_columns > 0 and not keep:
        raise ValueError("gr::linear needs keep=True where gradients of silu are wanted")
    ctx.save_for_backward(x, weight, output[1])
    ctx.silu_columns = silu_columns
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, z = ctx.saved_tensors
    wants_x, wants_weight, wants_bias, wants_residual = ctx.needs_input_grad[:4]
    dz, dbias = _silu_backward(dy, z, ctx.silu_columns) if ctx.silu_columns > 0 else (dy, None)
    if dbias is None and wants_bias:
        dbias = dz.sum(0, dtype=torch.float32)
    return (
        dz @ weight if wants_x else None,
        dz.T @ x if wants_weight else None,
        dbias.to(ctx.bias_dtype) if dbias is not None and wants_bias else None,
        dy if wants_residual else None,
        None,
        None,
    )


_forward.register_autograd(_gradients, setup_context=_save)
