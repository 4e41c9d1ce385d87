"""Gated norm in eager PyTorch; computes in float32, or in float64 for float64 inputs.

Letters: L tokens, C = G * V channels of G groups.
"""

import torch
from torch import Tensor

_LOW_32 = 0xFFFFFFFF


def norm_gate(
    x_LC: Tensor,
    u_LC: Tensor,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    seed: Tensor | None,
    num_groups: int,
    eps: float,
    concat: bool,
    dropout: float,
) -> Tensor:
    """Return dropout(norm(x) * u), or dropout([u, x, norm(x) * u]), in the dtype of x."""
    vectors = (weight_C, bias_C, seed)
    out, _, _ = norm_gate_parts(x_LC, u_LC, *vectors, num_groups, eps, concat, dropout)
    return out.to(x_LC.dtype)


def norm_gate_parts(
    x_LC: Tensor,
    u_LC: Tensor,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    seed: Tensor | None,
    num_groups: int,
    eps: float,
    concat: bool,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, mean (L, G) and rstd (L, G) as they were computed, not rounded."""
    compute = torch.promote_types(x_LC.dtype, torch.float32)
    x, u = x_LC.to(compute), u_LC.to(compute)
    x_LGV = x.reshape(x.shape[0], num_groups, x.shape[1] // num_groups)
    mean = x_LGV.mean(2, keepdim=True)
    centred = x_LGV - mean
    rstd = torch.rsqrt(centred.square().mean(2, keepdim=True) + eps)
    y: Tensor = (centred * rstd).flatten(1)
    if weight_C is not None:
        y = y * weight_C
    if bias_C is not None:
        y = y + bias_C
    y = y * u
    if concat:
        y = torch.cat([u, x, y], 1)
    if dropout > 0:
        assert seed is not None
        y = torch.where(kept(seed, y.shape[0], y.shape[1], dropout), y / (1 - dropout), 0)
    return y, mean[:, :, 0], rstd[:, :, 0]


def kept(seed: Tensor, rows: int, columns: int, dropout: float) -> Tensor:
    """Return (rows, columns) bool: what dropout keeps, a hash of (seed, row, column).

    h = mix(mix(low(seed) + row * 0x9E3779B9) ^ high(seed)), then keep where
    mix(h ^ column * 0x85EBCA6B) >> 8 >= round(dropout * 2^24).

    Args:
        seed: one int64.
        rows: L.
        columns: of the output.
        dropout: probability that an element is dropped.
    """
    low, high = seed & _LOW_32, (seed >> 32) & _LOW_32
    row = torch.arange(rows, device=seed.device) * 0x9E3779B9
    column = torch.arange(columns, device=seed.device) * 0x85EBCA6B
    row_key = _mix(_mix((low + row) & _LOW_32) ^ high)
    drawn = _mix(row_key[:, None] ^ (column & _LOW_32)[None, :]) >> 8
    return drawn >= round(dropout * 2**24)


def _mix(x: Tensor) -> Tensor:
    """Return a bijection of 32 bits, held in int64. Source: lowbias32 of C. Wellons, 2018."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _LOW_32
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _LOW_32
    return x ^ (x >> 16)
