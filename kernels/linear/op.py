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
    check_linear(x_LD, weight_FD, bias_F, activation, residual_LF)
    columns = silu_columns_of(activation, silu_columns, weight_FD.shape[0])
    chosen = resolve(impl, x_LD, not_hopper=why_not_hopper(x_LD, weight_FD, residual_LF))
    if chosen is Impl.REFERENCE:
        return reference.linear(x_LD, weight_FD, bias_F, residual_LF, columns)
    if x_LD.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"x must be float32, float16 or bfloat16 for impl='triton', got {x_LD.dtype}: use "
            "impl='reference'"
        )
    hopper = chosen is Impl.HOPPER
    learns = any(t is not None and t.requires_grad for t in (x_LD, weight_FD, bias_F))
    keep = columns > 0 and learns and torch.is_grad_enabled()
    y_LF: Tensor = _forward(x_LD, weight_FD, bias_F, residual_LF, columns, keep, hopper)[0]
    return y_LF


def forward_keeping(
    x_LD: Tensor,
    weight_FD: Tensor,
    bias_F: Tensor | None = None,
    *,
    silu_columns: int,
    impl: Impl | str = Impl.AUTO,
) -> tuple[Tensor, Tensor]:
    """Return y and z of linear with SiLU, for a layer with a backward pass of its own.

    Not differentiable. Arguments and errors are those of `linear`.
    """
    check_linear(x_LD, weight_FD, bias_F, "silu", None)
    columns = silu_columns_of("silu", silu_columns, weight_FD.shape[0])
    x_LD, weight_FD = x_LD.detach(), weight_FD.detach()
    bias_F = None if bias_F is None else bias_F.detach()
    chosen = resolve(impl, x_LD, not_hopper=why_not_hopper(x_LD, weight_FD, None))
    if chosen is Impl.REFERENCE:
        z = reference.linear(x_LD, weight_FD, bias_F, None, 0)
        return reference.silu_first(z, columns), z
    operands = (x_LD, weight_FD, bias_F, None)
    found: tuple[Tensor, Tensor] = _forward(*operands, columns, True, chosen is Impl.HOPPER)
    return found


def silu_backward(
    dy_LF: Tensor, z_LF: Tensor, *, silu_columns: int, impl: Impl | str = Impl.AUTO
) -> tuple[Tensor, Tensor]:
    """Return dz = dy * silu'(z), dtype of z, and its sum (F,), at least float32.

    Args:
        dy_LF: (L, F) gradient of y.
        z_LF: as forward_keeping returned it.
        silu_columns: SiLU was applied to so many first columns.
        impl: which implementation runs.
    """
    if resolve(impl, z_LF) is Impl.REFERENCE:
        dz = reference.silu_backward(dy_LF, z_LF, silu_columns)
        return dz.to(z_LF.dtype), dz.sum(0)
    found: tuple[Tensor, Tensor] = _silu_backward(dy_LF, z_LF, silu_columns)
    return found


def silu_columns_of(activation: str, silu_columns: int | None, F: int) -> int:
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


def check_linear(
    x_LD: Tensor,
    weight_FD: Tensor,
    bias_F: Tensor | None,
    activation: str,
    residual_LF: Tensor | None,
    *,
    fp8: bool = False,
) -> None:
    """Refuse arguments of linear that do not fit; in fp8 the weight may be kept in float32.

    Raises:
        ValueError: naming the argument.
    """
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
        if fp8 and name == "weight" and weight_FD.dtype == torch.float32:
            continue
        if tensor is not None and tensor.dtype != x_LD.dtype:
            raise ValueError(f"{name} must be {x_LD.dtype} as x is, got {tensor.dtype}")
    for name, tensor in (("weight", weight_FD), ("bias", bias_F), ("residual", residual_LF)):
        if tensor is not None and tensor.device != x_LD.device:
            raise ValueError(f"{name} must be on {x_LD.device} as x is, got {tensor.device}")


def why_not_hopper(x: Tensor, weight: Tensor, residual: Tensor | None) -> str:
    """Return why the Hopper kernel cannot take these arguments; empty if it can."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"x must be float16 or bfloat16, got {x.dtype}"
    for name, tensor in {"x": x, "weight": weight, "residual": residual}.items():
        if tensor is not None and not fits_tma(tensor):
            return (
                f"rows of {name} must begin at multiples of 16 bytes, got row stride "
                f"{tensor.stride(0)} and offset {tensor.storage_offset()} of {tensor.dtype}"
            )
    if weight.shape[0] % 8:
        return f"weight must have a multiple of 8 rows, got {weight.shape[0]}"
    return ""


def fits_tma(tensor: Tensor) -> bool:
    """Whether the TMA unit can address a tensor, once its columns have been made contiguous."""
    item = tensor.element_size()
    if tensor.stride(1) != 1:
        return tensor.shape[1] * item % 16 == 0
    aligned = tensor.stride(0) * item % 16 == 0 and tensor.storage_offset() * item % 16 == 0
    return aligned and tensor.stride(0) > 0


def _describe(x: Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype}"


def rows_of(x: Tensor) -> Tensor:
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
    hopper: bool = False,
) -> tuple[Tensor, Tensor]:
    if hopper:
        from kernels.linear._hopper import linear_fwd
    else:
        from kernels.linear._triton import linear_fwd  # type: ignore[assignment]
    return linear_fwd(
        rows_of(x),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        None if residual is None else rows_of(residual),
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
    hopper: bool = False,
) -> tuple[Tensor, Tensor]:
    L, F = x.shape[0], weight.shape[0]
    return x.new_empty(L, F), x.new_empty(L if keep else 0, F)


@torch.library.custom_op("gr::silu_bwd", mutates_args=())
def _silu_backward(dy: Tensor, z: Tensor, silu_columns: int) -> tuple[Tensor, Tensor]:
    from kernels.linear._triton import silu_bwd

    return silu_bwd(rows_of(dy), z, silu_columns)


@_silu_backward.register_fake
def _(dy: Tensor, z: Tensor, silu_columns: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(z), z.new_empty(z.shape[1], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, _, silu_columns, keep, _ = inputs
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
        None,
    )


_forward.register_autograd(_gradients, setup_context=_save)
