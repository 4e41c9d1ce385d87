"""Layer norm in eager PyTorch; computes in float32, or in float64 for float64 inputs."""

import torch
from torch import Tensor


def layer_norm(x_LD: Tensor, weight_D: Tensor | None, bias_D: Tensor | None, eps: float) -> Tensor:
    """Return (x - mean) / sqrt(var + eps) * weight + bias, row by row, in the dtype of x."""
    x = x_LD.to(torch.promote_types(x_LD.dtype, torch.float32))
    centred = x - x.mean(1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(1, keepdim=True) + eps)
    if weight_D is not None:
        y = y * weight_D
    if bias_D is not None:
        y = y + bias_D
    return y.to(x_LD.dtype)
