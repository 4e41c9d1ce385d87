"""Layer norm in eager PyTorch; computes in float32, or in float64 for float64 inputs."""

import torch
from torch import Tensor
from torch.nn import functional


def layer_norm(x_LD: Tensor, weight_D: Tensor | None, bias_D: Tensor | None, eps: float) -> Tensor:
    """Return (x - mean) / sqrt(var + eps) * weight + bias, row by row, in the dtype of x."""
    compute = torch.promote_types(x_LD.dtype, torch.float32)
    weight, bias = (None if w is None else w.to(compute) for w in (weight_D, bias_D))
    return functional.layer_norm(x_LD.to(compute), x_LD.shape[1:], weight, bias, eps).to(x_LD.dtype)


def layer_norm_parts(
    x_LD: Tensor, weight_D: Tensor | None, bias_D: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y (L, D), mean (L,) and rstd (L,) as they were computed, not rounded."""
    x = x_LD.to(torch.promote_types(x_LD.dtype, torch.float32))
    mean = x.mean(1, keepdim=True)
    centred = x - mean
    rstd = torch.rsqrt(centred.square().mean(1, keepdim=True) + eps)
    y = centred * rstd
    if weight_D is not None:
        y = y * weight_D
    if bias_D is not None:
        y = y + bias_D
    return y, mean[:, 0], rstd[:, 0]
