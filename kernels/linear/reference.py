"""Linear map in eager PyTorch; computes in float32, or in float64 for float64 inputs."""

import torch
from torch import Tensor
from torch.nn import functional

from kernels.quantize import QuantizedRows


def linear(
    x_LD: Tensor,
    weight_FD: Tensor,
    bias_F: Tensor | None,
    residual_LF: Tensor | None,
    silu_columns: int,
) -> Tensor:
    """Return x W^T + b with silu on the first columns, or plus residual, in the dtype of x."""
    compute = torch.promote_types(x_LD.dtype, torch.float32)
    bias = None if bias_F is None else bias_F.to(compute)
    y = functional.linear(x_LD.to(compute), weight_FD.to(compute), bias)
    y = silu_first(y, silu_columns)
    if residual_LF is not None:
        y = y + residual_LF
    return y.to(x_LD.dtype)


def silu_first(z_LF: Tensor, columns: int) -> Tensor:
    """Return z with SiLU applied to its first columns."""
    if columns == 0:
        return z_LF
    if columns == z_LF.shape[1]:
        return functional.silu(z_LF)
    return torch.cat([functional.silu(z_LF[:, :columns]), z_LF[:, columns:]], 1)


def silu_backward(dy_LF: Tensor, z_LF: Tensor | None, columns: int) -> Tensor:
    """Return dy * silu'(z) in the first columns and dy in the others, in float32 or more."""
    dy = dy_LF.to(torch.promote_types(dy_LF.dtype, torch.float32))
    if z_LF is None or columns == 0:
        return dy
    z = z_LF[:, :columns].to(dy.dtype)
    sigmoid = torch.sigmoid(z)
    slope = sigmoid * (1 + z * (1 - sigmoid))
    return torch.cat([dy[:, :columns] * slope, dy[:, columns:]], 1)


def _value(rows: QuantizedRows) -> Tensor:
    return rows.values.to(torch.float32) * rows.scale[:, None]


def linear_fp8(
    x: QuantizedRows,
    weight: QuantizedRows,
    bias_F: Tensor | None,
    residual_LF: Tensor | None,
    silu_columns: int,
    keep: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Return y and (if `keep`) z of the rows that the quantised ones stand for, in float32."""
    z = linear(_value(x), _value(weight), bias_F, None, 0)
    y = silu_first(z, silu_columns)
    if residual_LF is not None:
        y = y + residual_LF
    return y.to(dtype), z.to(dtype) if keep else None
