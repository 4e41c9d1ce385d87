"""What a 4-bit row means, in torch.

Bytes of a row of D values: D / 2 of values, the even column in the low half of a byte; then scale
and bias, float16 each, in the byte order of the machine.
"""

import torch
from torch import Tensor

CONSTANTS = 4
"""Bytes of scale and bias."""


def row_bytes(dim: int) -> int:
    """Return the bytes of a row of `dim` values, a multiple of 4."""
    return dim // 2 + CONSTANTS


def dequantize_int4(rows_NW: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (N, D) values * scale + bias, computed in float32."""
    packed = rows_NW[:, :-CONSTANTS]
    constants = rows_NW[:, -CONSTANTS:].contiguous().view(torch.float16).float()
    values = torch.stack([packed & 15, packed >> 4], 2).flatten(1).float()
    return (values * constants[:, :1] + constants[:, 1:]).to(dtype)
