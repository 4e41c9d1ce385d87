"""Row-wise quantisation to fp8: the operator and its checks."""

import torch
from torch import Tensor

from kernels.dispatch import Impl, resolve
from kernels.quantize import reference


def quantize_rows(x_LD: Tensor, *, impl: Impl | str = Impl.AUTO) -> tuple[Tensor, Tensor]:
    """Return x in fp8 with one scale a row: x = q * scale up to the rounding of e4m3.

    scale = max(|row|, 1e-30) / 448; q is rounded to the nearest, ties to even. A row that holds NaN
    or infinity gets scale NaN and q = 0, so that whatever is computed from it is NaN. Not
    differentiable.

    Args:
        x_LD: (L, D) float32, float16 or bfloat16, any row stride.
        impl: which implementation runs. All give the same bits.

    Returns:
        q (L, D) float8_e4m3fn and scale (L,) float32.

    Raises:
        ValueError: if shape or dtype do not fit, D is above 16384 (Triton), or the GPU has no fp8.

    Source: row-wise scales of 2602.16986, section on mixed precision; e4m3 as in 2209.05433.
    """
    if x_LD.dim() != 2 or x_LD.shape[1] == 0:
        raise ValueError(f"x must be (L, D) with D > 0, got {tuple(x_LD.shape)}")
    if x_LD.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"x must be float32, float16 or bfloat16, got {x_LD.dtype}")
    if resolve(impl, x_LD) is Impl.REFERENCE:
        return reference.quantize_rows(x_LD.detach())
    _check_triton(x_LD)
    q_LD, scale_L = _quantize_rows(x_LD.detach())
    return q_LD, scale_L


def _check_triton(x_LD: Tensor) -> None:
    from kernels._triton.rows import check_rows

    check_rows("x", x_LD.dtype, x_LD.shape[1])
    if x_LD.is_cuda and torch.cuda.get_device_capability(x_LD.device) < (8, 9):
        raise ValueError(
            "impl='triton' makes fp8 on GPUs of compute capability 8.9 or more, "
            f"{torch.cuda.get_device_name(x_LD.device)} has "
            f"{torch.cuda.get_device_capability(x_LD.device)}: use impl='reference'"
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
