"""Row-wise quantisation to fp8: the operators and their checks."""

import torch
from torch import Tensor

from kernels.dispatch import Impl, resolve
from kernels.quantize import reference
from kernels.quantize.reference import QuantizedRows, padded_tokens


def quantize_rows(x_LD: Tensor, *, impl: Impl | str = Impl.AUTO) -> QuantizedRows:
    """Return x in fp8 with one scale a row: x = values * scale up to the rounding of e4m3.

    scale is the least power of two with max(|row|) / scale <= 448, at least 2^-60; values are
    x / scale, which is exact, rounded to the nearest, ties to even. A row that holds NaN or
    infinity gets scale NaN and values 0, so that whatever is computed from it is NaN. Not
    differentiable.

    A power of two costs no digits: e4m3 is a floating format. It lets scales be multiplied into
    values that are fp8 already without rounding them again (`transpose_rows`).

    Args:
        x_LD: (L, D) float32, float16 or bfloat16, any row stride.
        impl: which implementation runs. All give the same bits.

    Raises:
        ValueError: if shape or dtype do not fit, D is above 16384 (Triton), or the GPU has no fp8.

    Source: row-wise scales of 2602.16986, section on mixed precision; e4m3 as in 2209.05433; scales
    that are powers of two as in 2310.10537.
    """
    if x_LD.dim() != 2 or x_LD.shape[1] == 0:
        raise ValueError(f"x must be (L, D) with D > 0, got {tuple(x_LD.shape)}")
    if x_LD.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"x must be float32, float16 or bfloat16, got {x_LD.dtype}")
    if resolve(impl, x_LD) is Impl.REFERENCE:
        return reference.quantize_rows(x_LD.detach())
    check_triton_rows("x", x_LD, x_LD.shape[1])
    return QuantizedRows(*_quantize_rows(x_LD.detach()))


def transpose_rows(
    values_LD: Tensor, factor_L: Tensor | None = None, *, impl: Impl | str = Impl.AUTO
) -> Tensor:
    """Return fp8 values with tokens along the rows, for a product that sums over tokens.

    Without a factor bytes are moved; with one, values * factor is rounded to e4m3 (largest finite
    value where it is above 448). Factors that are powers of two up to 1 change no digit of what
    stays above 2^-6; below, steps are 2^-9. Not differentiable.

    Args:
        values_LD: (L, D) float8_e4m3fn, contiguous.
        factor_L: (L,) float32, of each token; or None for 1.
        impl: which implementation runs. All give the same bits.

    Returns:
        (D, L rounded up to a multiple of 32) float8_e4m3fn, zeros past L.

    Raises:
        ValueError: if shapes or dtypes do not fit, or the GPU has no fp8.
    """
    if values_LD.dim() != 2 or values_LD.dtype != torch.float8_e4m3fn or values_LD.shape[1] == 0:
        raise ValueError(
            f"values must be (L, D) float8_e4m3fn with D > 0, got {tuple(values_LD.shape)} "
            f"{values_LD.dtype}"
        )
    if factor_L is not None and (
        factor_L.shape != values_LD.shape[:1]
        or factor_L.dtype != torch.float32
        or factor_L.device != values_LD.device
    ):
        raise ValueError(
            f"factor must be ({values_LD.shape[0]},) float32 on {values_LD.device}, got "
            f"{tuple(factor_L.shape)} {factor_L.dtype} on {factor_L.device}"
        )
    if resolve(impl, values_LD) is Impl.REFERENCE:
        return reference.transpose_rows(values_LD, factor_L)
    _check_fp8_gpu(values_LD)
    out: Tensor = _transpose_rows(values_LD, factor_L)
    return out


def check_triton_rows(name: str, x: Tensor, columns: int) -> None:
    """Refuse rows that the Triton kernels do not quantise.

    Args:
        name: of the argument, for the message.
        x: a tensor of the rows' dtype and device.
        columns: length of a row.

    Raises:
        ValueError: if a row is too wide or of another dtype, or the GPU has no fp8.
    """
    from kernels._triton.rows import check_rows

    check_rows(name, x.dtype, columns)
    _check_fp8_gpu(x)


def _check_fp8_gpu(x: Tensor) -> None:
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 9):
        raise ValueError(
            "impl='triton' makes fp8 on GPUs of compute capability 8.9 or more, "
            f"{torch.cuda.get_device_name(x.device)} has "
            f"{torch.cuda.get_device_capability(x.device)}: use impl='reference'"
        )


@torch.library.custom_op("gr::quantize_rows", mutates_args=())
def _quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    from kernels.quantize import _triton

    return _triton.quantize_rows(x if x.stride(1) == 1 else x.contiguous())


@_quantize_rows.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape, dtype=torch.float8_e4m3fn),
        x.new_empty(x.shape[0], dtype=torch.float32),
    )


@torch.library.custom_op("gr::transpose_rows", mutates_args=())
def _transpose_rows(values: Tensor, factor: Tensor | None) -> Tensor:
    from kernels.quantize import _triton

    return _triton.transpose_rows(
        values.contiguous(), None if factor is None else factor.contiguous()
    )


@_transpose_rows.register_fake
def _(values: Tensor, factor: Tensor | None) -> Tensor:
    return values.new_empty(values.shape[1], padded_tokens(values.shape[0]))
