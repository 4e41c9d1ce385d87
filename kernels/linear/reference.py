"""Linear map in eager PyTorch; computes in float32, or in float64 for float64 inputs."""

import torch
from torch import Tensor
from torch.nn import functional


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
