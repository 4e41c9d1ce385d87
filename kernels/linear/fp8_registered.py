"""The products in fp8 as registered operators of torch, and which implementation runs."""

import torch
from torch import Tensor

from kernels.dispatch import Impl, resolve
from kernels.linear.op import fits_tma, rows_of
from kernels.quantize.reference import padded_tokens


def resolve_fp8(
    impl: Impl | str, x: Tensor, F: int, D: int, dtype: torch.dtype, residual: Tensor | None
) -> Impl:
    """Return which implementation runs, as kernels.dispatch.resolve."""
    return resolve(impl, x, not_hopper=why_not_hopper(F, D, dtype, residual))


def why_not_hopper(F: int, D: int, dtype: torch.dtype, residual: Tensor | None) -> str:
    """Return why the Hopper kernels cannot multiply by an (F, D) weight; empty if they can."""
    if D % 16 or F % 8:
        return f"columns must be multiples of 16 and rows of the weight of 8, got {D} and {F}"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the result must be float16 or bfloat16, got {dtype}"
    if residual is not None and not fits_tma(residual):
        return f"rows of the residual must begin at multiples of 16 bytes, got {residual.stride()}"
    return ""


def rowwise(impl: Impl | str) -> str:
    """Return the implementation of row-wise operators, which have no Hopper kernel of their own.

    As a string: torch.compile cannot make a member of Impl from another.
    """
    return "triton" if impl == "hopper" else str(impl)


@torch.library.custom_op("gr::linear_fp8", mutates_args=())
def run_forward(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    silu_columns: int,
    keep: bool,
    dtype: torch.dtype,
    hopper: bool,
) -> tuple[Tensor, Tensor]:
    """Return y and z (empty unless `keep`) of x in fp8."""
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
        scales=(x_scale.contiguous(), weight_scale.contiguous()),
        dtype=dtype,
    )


@run_forward.register_fake
def _(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    silu_columns: int,
    keep: bool,
    dtype: torch.dtype,
    hopper: bool,
) -> tuple[Tensor, Tensor]:
    L, F = x.shape[0], weight.shape[0]
    return x.new_empty(L, F, dtype=dtype), x.new_empty(L if keep else 0, F, dtype=dtype)


@torch.library.custom_op("gr::product_fp8", mutates_args=())
def run_product(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    dtype: torch.dtype,
    hopper: bool,
) -> Tensor:
    """Return a b^T, promoted, times the scales of both where they are given."""
    scales = None
    if a_scale is not None and b_scale is not None:
        scales = (a_scale.contiguous(), b_scale.contiguous())
    if hopper:
        from kernels.linear._hopper.product_fp8 import fp8_product

        return fp8_product(a.contiguous(), b.contiguous(), scales, dtype)
    from kernels.linear._triton import linear_fwd

    operands = (a.contiguous(), b.contiguous())
    return linear_fwd(*operands, None, None, 0, False, scales=scales, dtype=dtype, promote=True)[0]


@run_product.register_fake
def _(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    dtype: torch.dtype,
    hopper: bool,
) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)


@torch.library.custom_op("gr::silu_bwd_fp8", mutates_args=())
def run_silu_backward(
    dy: Tensor, z: Tensor | None, silu_columns: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q, its scales, dz (empty unless `keep`) and its sum over rows."""
    from kernels.linear._triton.silu_fp8 import silu_bwd_fp8

    return silu_bwd_fp8(rows_of(dy), None if z is None else z.contiguous(), silu_columns, keep)


@run_silu_backward.register_fake
def _(
    dy: Tensor, z: Tensor | None, silu_columns: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    L, F = dy.shape
    return (
        dy.new_empty(L, F, dtype=torch.float8_e4m3fn),
        dy.new_empty(L, dtype=torch.float32),
        dy.new_empty(L if keep else 0, F),
        dy.new_empty(F, dtype=torch.float32),
    )


@torch.library.custom_op("gr::silu_bwd_fp8_transposed", mutates_args=())
def run_silu_backward_transposed(
    dy: Tensor, z: Tensor, silu_columns: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q, its scales, q transposed and the sum of dz over rows."""
    from kernels.linear._hopper.silu_fp8 import silu_bwd_fp8_transposed

    return silu_bwd_fp8_transposed(rows_of(dy), z.contiguous(), silu_columns)


@run_silu_backward_transposed.register_fake
def _(dy: Tensor, z: Tensor | None, silu_columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    L, F = dy.shape
    return (
        dy.new_empty(L, F, dtype=torch.float8_e4m3fn),
        dy.new_empty(L, dtype=torch.float32),
        dy.new_empty(F, padded_tokens(L), dtype=torch.float8_e4m3fn),
        dy.new_empty(F, dtype=torch.float32),
    )
