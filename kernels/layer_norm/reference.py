"""Layer norm in eager PyTorch; computes in float32, or in float64 for float64 inputs."""

import torch
from torch import Tensor


def layer_norm(x_LD: Tensor, weight_D: Tensor | None, bias_D: Tensor | None, eps: float) -> Tensor:
    """Return (x - mean) / sqrt(var + eps) * weight + bias, row by row, in the dtype of x."""
    return layer_norm_parts(x_LD, weight_D, bias_D, eps)[0].to(x_LD.dtype)


def layer_norm_parts(
    x_LD: Tensor, weight_D: Tensor | None, bias_D: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y (L, D), mean (L,) and rstd (L,) as they were computed, not rounded."""
    compute = torch.promote_types(x_LD.dtype, torch.float32)
    weight, bias = (None if w is None else w.to(compute) for w in (weight_D, bias_D))
    y, mean, rstd = torch.native_layer_norm(x_LD.to(compute), x_LD.shape[1:], weight, bias, eps)
    return y, mean[:, 0], rstd[:, 0]
