"""Rotary embedding: the operator, its checks and its gradient."""

from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import Impl, resolve
from kernels.rotary import reference
from kernels.rotary.reference import Rotation

MAX_DIM = 512
"""Widest head that the kernel holds."""


def rotary(x_LHK: Tensor, rotation: Rotation, *, impl: Impl | str = Impl.AUTO) -> Tensor:
    """Return x with each pair (p, p + K / 2) of a head turned by its angle.

        y[p] = x[p] cos - x[p + K/2] sin,    y[p + K/2] = x[p] sin + x[p + K/2] cos

    The dot product of two rows then depends on the difference of their angles only. Computed in
    float32 (float64 for float64) and rounded once.

    Args:
        x_LHK: (L, H, K) floating, any strides; K even.
        rotation: cos and sin (L, G, K / 2), G = 1 for all heads or H; not differentiated.
        impl: which implementation runs.

    Returns:
        (L, H, K), dtype of x, contiguous.

    Raises:
        ValueError: if shapes, dtypes or devices do not agree.

    Source: Su et al. 2021 (2104.09864), equation 15; angles of order and time: 2510.20455.
    """
    _check(x_LHK, rotation)
    cos, sin = (part.detach() for part in rotation)
    if resolve(impl, x_LHK) is Impl.REFERENCE:
        return reference.rotary(x_LHK, cos, sin)
    if x_LHK.dtype not in (torch.float32, torch.float16, torch.bfloat16) or (
        x_LHK.shape[2] > MAX_DIM
    ):
        raise ValueError(
            "x must be float32, float16 or bfloat16 with heads of at most "
            f"{MAX_DIM} for impl='triton', got {x_LHK.dtype} and {x_LHK.shape[2]}: use "
            "impl='reference'"
        )
    y_LHK: Tensor = _rotary(x_LHK, cos.contiguous(), sin.contiguous(), False)
    return y_LHK


def _check(x_LHK: Tensor, rotation: Rotation) -> None:
    if x_LHK.dim() != 3 or not x_LHK.is_floating_point():
        raise ValueError(f"x must be (L, H, K) floating, got {tuple(x_LHK.shape)} {x_LHK.dtype}")
    dtype = torch.float64 if x_LHK.dtype == torch.float64 else torch.float32
    check_rotation(rotation, tuple(x_LHK.shape), dtype, x_LHK.device)


def check_rotation(
    rotation: Rotation, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Refuse angles that do not fit rows x of this shape, (L, H, K).

    Raises:
        ValueError: naming what does not fit.
    """
    L, H, K = shape
    if K % 2 or K == 0 or H == 0:
        raise ValueError(f"x must have heads of an even dim, got {tuple(shape)}")
    for name, part in (("cos", rotation.cos), ("sin", rotation.sin)):
        if part.dim() != 3 or part.shape[0] != L or part.shape[2] != K // 2:
            raise ValueError(
                f"rotation.{name} must be ({L}, 1 or {H}, {K // 2}) as x is {tuple(shape)}, "
                f"got {tuple(part.shape)}"
            )
        if part.shape != rotation.cos.shape or part.shape[1] not in (1, H):
            raise ValueError(
                f"rotation.{name} must have 1 or {H} sets of angles, as many as cos, got "
                f"{tuple(part.shape)}"
            )
        if part.dtype != dtype or part.device != device:
            raise ValueError(
                f"rotation.{name} must be {dtype} on {device}, got {part.dtype} on {part.device}"
            )


@torch.library.custom_op("gr::rotary", mutates_args=())
def _rotary(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    from kernels.rotary import _triton

    return _triton.rotary(x if x.stride(2) == 1 else x.contiguous(), cos, sin, back=back)


@_rotary.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, back = inputs
    ctx.save_for_backward(cos, sin)
    ctx.back = back


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin = ctx.saved_tensors
    return _rotary(dy, cos, sin, not ctx.back), None, None, None


_rotary.register_autograd(_gradients, setup_context=_save)
