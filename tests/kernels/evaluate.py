"""Outputs and gradients of an operator, for comparison between implementations."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def outputs_and_gradients(
    op: Callable[..., Tensor], inputs: Sequence[Tensor | None], dout: Tensor
) -> list[Tensor]:
    """Return op(*inputs) and the gradient of sum(out * dout) for each floating input."""
    leaves = [
        x.detach().requires_grad_(x.is_floating_point()) if x is not None else None for x in inputs
    ]
    out = op(*leaves)
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    return [out, *torch.autograd.grad(out, wanted, dout.to(out.dtype))]


def double(inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return the inputs with floating tensors in float64."""
    return [x.double() if x is not None and x.is_floating_point() else x for x in inputs]
