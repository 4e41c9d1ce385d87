"""Outputs and gradients of an operator, for comparison between implementations."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def outputs_and_gradients(
    op: Callable[..., Tensor], inputs: Sequence[Tensor | None], dout: Tensor
) -> list[Tensor]:
    """Return op(*inputs) and the gradient of sum(out * dout) for each floating input."""
    leaves = [
        x.detach().requires_grad_(x.is_floating_point()) if x is not None else None for x in inputs
    ]
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    with poisoned_memory(dout.device):
        out = op(*leaves)
        return [out, *torch.autograd.grad(out, wanted, dout.to(out.dtype))]


@contextmanager
def poisoned_memory(device: torch.device) -> Iterator[None]:
    """Fill what torch.empty returns with NaN, so that an element left unwritten shows.

    In the interpreter only: on a GPU this mode refuses torch's matrix products.
    """
    torch.use_deterministic_algorithms(device.type == "cpu")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def double(inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return the inputs with floating tensors in float64."""
    return [x.double() if x is not None and x.is_floating_point() else x for x in inputs]
