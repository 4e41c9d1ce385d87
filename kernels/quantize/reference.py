"""Row-wise quantisation to fp8 e4m3 in eager PyTorch."""

from typing import NamedTuple

import torch
from torch import Tensor

LEAST_SCALE = 2.0**-60
"""Rows that are smaller keep fewer digits, and are zero at last. The product of two scales is still
an ordinary float32."""


class QuantizedRows(NamedTuple):
    """Rows in fp8, each with its scale: x = values * scale."""

    values: Tensor
    """(L, D) float8_e4m3fn."""
    scale: Tensor
    """(L,) float32, powers of two; NaN for a row that held NaN or infinity."""


def quantize_rows(x_LD: Tensor) -> QuantizedRows:
    """Return x in fp8: scale is the least power of two with max(|row|) / scale <= 448."""
    x = x_LD.to(torch.float32)
    amax = x.abs().amax(1)
    finite = amax.isfinite()
    # amax = fraction * 2^exponent with a fraction in [0.5, 1); 448 = 0.875 * 2^9.
    fraction, exponent = torch.frexp(torch.where(finite, amax, 1.0))
    exponent = exponent - 9 + (fraction > 0.875)
    scale = torch.ldexp(torch.ones_like(amax), exponent).clamp(min=LEAST_SCALE)
    scale = torch.where(finite, scale, torch.nan)
    q = torch.where(finite[:, None], x / scale[:, None], 0.0)
    return QuantizedRows(q.to(torch.float8_e4m3fn), scale)


def padded_tokens(L: int) -> int:
    """Return L rounded up to a multiple of 32: rows begin where memory's least pieces do."""
    return -(-L // 32) * 32


def transpose_rows(values_LD: Tensor, factor_L: Tensor | None) -> Tensor:
    """Return (D, padded L): the bytes transposed, or values * factor rounded to e4m3."""
    L = values_LD.shape[0]
    q = values_LD
    if factor_L is not None:
        q = (q.to(torch.float32) * factor_L[:, None]).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    out = torch.zeros(q.shape[1], padded_tokens(L), dtype=torch.uint8, device=q.device)
    out[:, :L] = q.view(torch.uint8).T
    return out.view(torch.float8_e4m3fn)
