"""Rotary embedding in eager PyTorch.

Letters: L tokens, H heads, K dim of a head, P = K / 2 pairs, G sets of angles (1, or H).
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """Angles of some tokens, as cosines and sines."""

    cos: Tensor
    """(L, G, P) float32 (float64 with float64 tokens)."""
    sin: Tensor
    """(L, G, P), likewise."""

    @staticmethod
    def of(angle_LGP: Tensor) -> "Rotation":
        """Return cosines and sines of angles in radians."""
        return Rotation(angle_LGP.cos(), angle_LGP.sin())

    def rows(self, index: Tensor) -> "Rotation":
        """Return the angles of the tokens `index`, (R,) int64."""
        return Rotation(self.cos.index_select(0, index), self.sin.index_select(0, index))


def rotary(x_LHK: Tensor, cos_LGP: Tensor, sin_LGP: Tensor) -> Tensor:
    """Return (L, H, K): see kernels.rotary."""
    dtype = torch.promote_types(x_LHK.dtype, torch.float32)
    a, b = x_LHK.to(dtype).chunk(2, dim=-1)
    cos_LGP, sin_LGP = cos_LGP.to(dtype), sin_LGP.to(dtype)
    turned = [a * cos_LGP - b * sin_LGP, a * sin_LGP + b * cos_LGP]
    return torch.cat(turned, dim=-1).to(x_LHK.dtype)
