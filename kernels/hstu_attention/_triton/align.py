"""Inputs in 16 bits with rows that ptxas compiles rightly.

Where a row's stride is not a multiple of 16 elements, Triton 3.6 gathers a tile element by element,
and the ptxas that comes with it (12.8.93) computes the address of the second slice of V from a
register that holds a stride: keys from the 17th on were read from anywhere (one H200, head dims 20
and 24, found by tests/kernels/test_hstu_layer.py). A copy with rows of such multiples takes the
way of the usual head dims.
"""

import torch
from torch import Tensor
from torch.nn import functional

ROW = 16
"""Elements that head dim and strides are a multiple of. Triton notices this number, no smaller."""


def aligned(x_LHD: Tensor) -> Tensor:
    """Return x itself, or a copy (L, H, D rounded up to 16), zero in the further columns.

    Args:
        x_LHD: columns contiguous.
    """
    D = x_LHD.shape[2]
    strides = x_LHD.stride()[:2]
    fits = D % ROW == 0 and all(stride % ROW == 0 for stride in strides)
    if x_LHD.dtype == torch.float32 or (fits and x_LHD.data_ptr() % 16 == 0):
        return x_LHD
    return functional.pad(x_LHD, (0, -D % ROW)).contiguous()


def narrowed(x_LHD: Tensor, dim: int) -> Tensor:
    """Return the first `dim` columns, contiguous: what `aligned` added is left out."""
    return x_LHD[..., :dim].contiguous()
