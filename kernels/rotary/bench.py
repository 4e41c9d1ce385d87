"""Rotary embedding of queries that are columns of a UVQK buffer, against torch."""

import torch

from kernels.bench import Case, timed
from kernels.rotary import Rotation, rotary

TOKENS = 131072
CASES = [
    Case(f"L={TOKENS} H=4 K={dim}", torch.bfloat16, {"L": TOKENS, "H": 4, "K": dim})
    for dim in (64, 128, 256)
]


def variants(case, mode, device):
    L, H, K = (case.shape[letter] for letter in "LHK")
    buffer = torch.randn(L, 4, H, K, device=device, dtype=case.dtype)
    angle = torch.randn(L, 1, K // 2, device=device) * 100
    rotation = Rotation.of(angle)
    of_bfloat16 = Rotation(*(part.to(case.dtype) for part in rotation))

    def torch_operators(x):
        a, b = x.chunk(2, dim=-1)
        cos, sin = of_bfloat16
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

    q = buffer[:, 2]
    return {
        "ours": timed(lambda x: rotary(x, rotation), (q,), mode),
        "torch, in bfloat16": timed(torch_operators, (q,), mode),
    }


def bytes_moved(case, mode):
    L, H, K = (case.shape[letter] for letter in "LHK")
    return L * (2 * H * K * case.dtype.itemsize + 4 * K)


def flops(case, mode):
    return 0
