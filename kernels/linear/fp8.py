"""Linear map in fp8, and the pieces of which a fused layer makes its own.

Forward   z = (x in fp8) (W in fp8)^T + b, then the epilogue of `linear`; row-wise scales.
Backward  dz = dy * silu'(z) in fp8 by rows, dx = dz W with W quantised along F,
          dW = sum over tokens of dz x, in fp8 ("fold") or in 16 bits ("bf16").

A scale belongs to a token, and dW sums over tokens: fold multiplies both scales of a token, powers
of two, into its x, which rounds nothing but what falls below 2^-15 of the largest.

    dW = top * sum_i q_i (x_i * (s_i t_i / top)),  top = max_i s_i t_i

with q, s of dz and x, t of x. Products are summed in float32: in dx and dW the tensor cores' short
sums are promoted every 128 products. The forward pass relies on the tensor cores alone, as is usual
(at D = 1024 hardly a loss for data without a mean, 1e-2 where all products have one sign).

A row that holds NaN or infinity is NaN in the output and in dx, and makes dW and db NaN, as in any
precision; it changes no other row.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import Impl, is_hopper, resolve
from kernels.linear import reference
from kernels.linear.fp8_registered import (
    resolve_fp8,
    rowwise,
    run_forward,
    run_product,
    run_silu_backward,
    run_silu_backward_transposed,
)
from kernels.linear.op import check_linear, silu_columns_of
from kernels.linear.weight import QuantizedWeight, quantize_weight
from kernels.quantize import QuantizedRows, quantize_rows, transpose_rows
from kernels.quantize.op import check_triton_rows
from kernels.quantize.reference import padded_tokens

Wgrad = Literal["auto", "fold", "bf16"]


class SiluBackwardFp8(NamedTuple):
    """What silu_backward_fp8 returns."""

    rows: QuantizedRows
    """dz (L, F) in fp8."""
    dz: Tensor | None
    """dz in the dtype of dy, if it was asked for."""
    dbias: Tensor
    """(F,) float32: the sum of dz over tokens."""
    transposed: Tensor | None
    """transpose_rows(rows.values), if it was asked for."""


def linear_fp8(
    x_LD: Tensor,
    weight_FD: Tensor,
    bias_F: Tensor | None = None,
    *,
    activation: Literal["none", "silu"] = "none",
    silu_columns: int | None = None,
    residual_LF: Tensor | None = None,
    quantized: QuantizedWeight | None = None,
    wgrad: Wgrad = "auto",
    impl: Impl | str = Impl.AUTO,
) -> Tensor:
    """Return `linear` with x and the weight rounded to fp8 (e4m3), row-wise scales.

    Args:
        x_LD: (L, D) float16 or bfloat16 (reference: also float32), any row stride.
        weight_FD: (F, D), dtype of x or float32: its gradient has this dtype.
        bias_F: as in linear, like what follows down to residual.
        activation: silu or none.
        silu_columns: SiLU on so many first columns.
        residual_LF: (L, F), added last.
        quantized: quantize_weight(weight), where the caller keeps it over several calls; it must be
            made anew when the weight changes. None quantises here.
        wgrad: how the gradient of the weight is computed: fold in fp8, bf16 in the dtype of x. auto
            takes what was faster on one H100 (`faster_wgrad`).
        impl: which implementation runs.

    Returns:
        (L, F), dtype of x.

    Raises:
        ValueError: as linear; if wgrad is unknown, if the quantised weight has another shape, or if
            an explicit impl cannot run.

    Source: 2209.05433 (e4m3), 2602.16986 (row-wise scales in HSTU). Ours sums promoted in float32
    and folds powers of two.
    """
    check_linear(x_LD, weight_FD, bias_F, activation, residual_LF, fp8=True)
    columns = silu_columns_of(activation, silu_columns, weight_FD.shape[0])
    F, D = weight_FD.shape
    if wgrad not in ("auto", "fold", "bf16"):
        raise ValueError(f"wgrad must be auto, fold or bf16, got {wgrad!r}")
    if quantized is None:
        chosen = resolve_fp8(impl, x_LD, F, D, x_LD.dtype, residual_LF)
        rowwise = "reference" if chosen is Impl.REFERENCE else "triton"
        quantized = quantize_weight(weight_FD, impl=rowwise)
    elif quantized.rows.values.shape != (F, D) or quantized.columns.values.shape != (D, F):
        raise ValueError(
            f"quantized must be of a weight ({F}, {D}), got "
            f"{tuple(quantized.rows.values.shape)} and transposed "
            f"{tuple(quantized.columns.values.shape)}"
        )
    if wgrad == "auto":
        wgrad = faster_wgrad(F, D, x_LD.device, has_silu=columns > 0)
    y_LF: Tensor = _LinearFp8.apply(  # type: ignore[no-untyped-call]
        x_LD,
        weight_FD,
        bias_F,
        residual_LF,
        *quantized.rows,
        *quantized.columns,
        columns,
        wgrad,
        str(impl),
    )
    return y_LF


def faster_wgrad(
    F: int, D: int, device: torch.device, *, has_silu: bool
) -> Literal["fold", "bf16"]:
    """Return how the gradient of an (F, D) weight was faster, docs/benchmarks/kernels.md.

    With SiLU fold also spares the backward pass to write dz in 16 bits.
    """
    least = LEAST_FOLD_SILU if has_silu else LEAST_FOLD
    return "fold" if is_hopper(device) and least <= F * D else "bf16"


LEAST_FOLD_SILU = 2048 * 512
LEAST_FOLD = 2048 * 2048
"""Elements of a weight from which fold was faster: 1024 x 1024 was not."""


def linear_fp8_forward(
    x: QuantizedRows,
    weight: QuantizedRows,
    bias_F: Tensor | None = None,
    residual_LF: Tensor | None = None,
    *,
    silu_columns: int = 0,
    keep: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    impl: Impl | str = Impl.AUTO,
) -> tuple[Tensor, Tensor | None]:
    """Return y (L, F), and z (L, F) if `keep`, of quantised x and weight. Not differentiable.

    Args:
        x: of (L, D), from quantize_rows or a producer such as layer_norm_fp8.
        weight: of (F, D): QuantizedWeight.rows.
        bias_F: (F,) floating, or None.
        residual_LF: (L, F) in `dtype`, added last, or None.
        silu_columns: y = silu(z) in so many first columns; 0 for none.
        keep: also return z in `dtype`, for silu_backward_fp8.
        dtype: of y and z.
        impl: which implementation runs.

    Raises:
        ValueError: if shapes do not fit, or an explicit impl cannot run.
    """
    F, D = weight.values.shape
    if x.values.shape[1] != D:
        raise ValueError(f"x must have rows of {D} as weight has, got {x.values.shape[1]}")
    chosen = resolve_fp8(impl, x.values, F, D, dtype, residual_LF)
    if chosen is Impl.REFERENCE:
        return reference.linear_fp8(x, weight, bias_F, residual_LF, silu_columns, keep, dtype)
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"the kernels store float16 or bfloat16, got {dtype}: use impl='reference'"
        )
    y, z = run_forward(
        *x, *weight, bias_F, residual_LF, silu_columns, keep, dtype, chosen is Impl.HOPPER
    )
    return y, z if keep else None


def silu_backward_fp8(
    dy_LF: Tensor,
    z_LF: Tensor | None,
    *,
    silu_columns: int,
    keep: bool = False,
    transpose: bool = False,
    impl: Impl | str = Impl.AUTO,
) -> SiluBackwardFp8:
    """Return dz = dy * silu'(z) in fp8 by rows and its sum, in one pass. Not differentiable.

    On Hopper the pass that makes dz also transposes it, where `transpose` is given without `keep`,
    with SiLU, in 16 bits and F a multiple of 16 up to 2048; else that is a second pass.

    Args:
        dy_LF: (L, F) floating, any row stride.
        z_LF: (L, F) as the forward pass kept it; None without SiLU.
        silu_columns: SiLU was applied to so many first columns; 0 for none: dz = dy.
        keep: also return dz in the dtype of dy, for the gradient of the weight in 16 bits.
        transpose: also return the fp8 values transposed, for the gradient of the weight in fp8.
        impl: which implementation runs.

    Raises:
        ValueError: if z is missing, or rows do not fit (see quantize_rows).
    """
    if silu_columns > 0 and z_LF is None:
        raise ValueError(f"silu_columns={silu_columns} needs z, got None")
    if resolve(rowwise(impl), dy_LF) is Impl.REFERENCE:
        dz = reference.silu_backward(dy_LF, z_LF, silu_columns)
        rows = quantize_rows(dz, impl=Impl.REFERENCE)
        return SiluBackwardFp8(
            rows,
            dz.to(dy_LF.dtype) if keep else None,
            dz.sum(0),
            transpose_rows(rows.values, impl=Impl.REFERENCE) if transpose else None,
        )
    F = dy_LF.shape[1]
    check_triton_rows("dy", dy_LF, F)
    at_once = (
        str(impl) != "triton"
        and is_hopper(dy_LF.device)
        and not keep
        and silu_columns > 0
        and dy_LF.dtype in (torch.float16, torch.bfloat16)
        and F % 16 == 0
        and F <= MAX_TRANSPOSED
    )
    if transpose and at_once:
        q, scale, q_FL, dbias = run_silu_backward_transposed(dy_LF, z_LF, silu_columns)
        return SiluBackwardFp8(QuantizedRows(q, scale), None, dbias, q_FL)
    q, scale, dz, dbias = run_silu_backward(dy_LF, z_LF, silu_columns, keep)
    return SiluBackwardFp8(
        QuantizedRows(q, scale),
        dz if keep else None,
        dbias,
        transpose_rows(q, impl="triton") if transpose else None,
    )


MAX_TRANSPOSED = 2048
"""Widest row that is transposed in the same pass. On one H100 that took 0.96 of the time of a whole
step at F = 2048, 1.01 and 1.02 at 4096 and 8192, and without SiLU 0.99 to 1.01. Rows of another
length than a multiple of 16 would leave byte by byte, and Triton 3.6 wrote wrong bytes then."""


def linear_fp8_dgrad(
    dz: QuantizedRows,
    weight: QuantizedRows,
    *,
    dtype: torch.dtype = torch.bfloat16,
    promote: bool = True,
    impl: Impl | str = Impl.AUTO,
) -> Tensor:
    """Return dx = dz W (L, D) in `dtype`.

    Args:
        dz: of (L, F).
        weight: of (D, F): QuantizedWeight.columns.
        dtype: of the result, 16 bits.
        promote: sum in float32; False leaves sums to the tensor cores, as in the forward pass:
            0.22 instead of 0.29 ms at D = 512 on one H100.
        impl: which implementation runs.

    Raises:
        ValueError: if an explicit impl cannot run.
    """
    D, F = weight.values.shape
    chosen = resolve_fp8(impl, dz.values, D, F, dtype, None)
    if chosen is Impl.REFERENCE:
        return reference.linear_fp8(dz, weight, None, None, 0, False, dtype)[0]
    if not promote:
        return linear_fp8_forward(dz, weight, dtype=dtype, impl=impl)[0]
    operands = (dz.values, weight.values, dz.scale, weight.scale)
    dx: Tensor = run_product(*operands, dtype, chosen is Impl.HOPPER)
    return dx


def linear_fp8_wgrad(
    dz: QuantizedRows,
    x: QuantizedRows,
    *,
    transposed: Tensor | None = None,
    impl: Impl | str = Impl.AUTO,
) -> Tensor:
    """Return dW = sum over tokens of dz x, (F, D) float32, in fp8 with the scales folded into x.

    Args:
        dz: of (L, F).
        x: of (L, D), scales powers of two as quantize_rows makes them.
        transposed: transpose_rows(dz.values), where silu_backward_fp8 made it; None makes it here.
        impl: which implementation runs.

    Raises:
        ValueError: if the numbers of tokens differ, or an explicit impl cannot run.
    """
    (L, F), D = dz.values.shape, x.values.shape[1]
    if x.values.shape[0] != L:
        raise ValueError(f"x must have {L} rows as dz has, got {x.values.shape[0]}")
    if L == 0:
        return dz.scale.new_zeros(F, D)
    chosen = resolve_fp8(impl, dz.values, D, 16, torch.float32, None)
    token_L = dz.scale * x.scale
    top = token_L.amax()
    rowwise = "reference" if chosen is Impl.REFERENCE else "triton"
    dz_FL = transpose_rows(dz.values, impl=rowwise) if transposed is None else transposed
    if dz_FL.shape != (F, padded_tokens(L)):
        raise ValueError(
            f"transposed must be ({F}, {padded_tokens(L)}) as transpose_rows makes it, got "
            f"{tuple(dz_FL.shape)}"
        )
    x_DL = transpose_rows(x.values, token_L / top, impl=rowwise)
    if chosen is Impl.REFERENCE:
        return (dz_FL.to(torch.float32) @ x_DL.to(torch.float32).T) * top
    found: Tensor = run_product(dz_FL, x_DL, None, None, torch.float32, chosen is Impl.HOPPER)
    return found * top


class _LinearFp8(torch.autograd.Function):
    """linear_fp8 with its gradients, put together from the functions above."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        row_values: Tensor,
        row_scale: Tensor,
        column_values: Tensor,
        column_scale: Tensor,
        silu_columns: int,
        wgrad: str,
        impl: str,
    ) -> Tensor:
        rows = quantize_rows(x, impl=rowwise(impl))
        learns = any(ctx.needs_input_grad[:3])
        y, z = linear_fp8_forward(
            rows,
            QuantizedRows(row_values, row_scale),
            bias,
            residual,
            silu_columns=silu_columns,
            keep=learns and silu_columns > 0,
            dtype=x.dtype,
            impl=impl,
        )
        folds = wgrad == "fold"
        of_x = rows if folds else (x, None)
        ctx.save_for_backward(*of_x, column_values, column_scale, z)
        ctx.options = (silu_columns, folds, impl, x.dtype, weight.dtype)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy = grads[0]
        x, x_scale, column_values, column_scale, z = ctx.saved_tensors
        silu_columns, folds, impl, dtype, weight_dtype = ctx.options
        wants_x, wants_weight, wants_bias, wants_residual = ctx.needs_input_grad[:4]
        dx = dweight = dbias = None
        if wants_x or wants_weight or wants_bias:
            keep = wants_weight and not folds and silu_columns > 0
            dz = silu_backward_fp8(
                dy,
                z,
                silu_columns=silu_columns,
                keep=keep,
                transpose=wants_weight and folds,
                impl=impl,
            )
            if wants_x:
                columns = QuantizedRows(column_values, column_scale)
                dx = linear_fp8_dgrad(dz.rows, columns, dtype=dtype, impl=impl)
            if wants_weight and folds:
                dweight = linear_fp8_wgrad(
                    dz.rows, QuantizedRows(x, x_scale), transposed=dz.transposed, impl=impl
                )
            elif wants_weight:
                dweight = (dy if dz.dz is None else dz.dz).T @ x
            dweight = None if dweight is None else dweight.to(weight_dtype)
            dbias = dz.dbias.to(ctx.bias_dtype) if wants_bias else None
        return (dx, dweight, dbias, dy if wants_residual else None, *[None] * 7)
