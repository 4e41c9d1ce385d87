"""Linear map in eager PyTorch; computes in float32, or in float64 for float64 inputs."""

import torch
from torch import Tensor
from torch.nn import functional


def linear(
    x_LD: Tensor,
    weight_FD: Tensor,
    bias_F: Tensor | None,
    residual_LF: Tensor | None,
    activation: str,
) -> Tensor:
    """Return silu(x W^T + b), or x W^T + b + residual, in the dtype of x."""
    compute = torch.promote_types(x_LD.dtype, torch.float32)
    bias = None if bias_F is None else bias_F.to(compute)
    y = functional.linear(x_LD.to(compute), weight_FD.to(compute), bias)
    if activation == "silu":
        y = functional.silu(y)
    if residual_LF is not None:
        y = y + residual_LF
    return y.to(x_LD.dtype)
