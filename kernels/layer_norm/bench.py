"""Layer norm against torch's, at the widths of the fused-layer benchmarks."""

import torch
from torch.nn import functional

from kernels.bench import Case, timed
from kernels.layer_norm import layer_norm, layer_norm_fp8

TOKENS = 131072
CASES = [
    Case(f"L={TOKENS} D={dim}", torch.bfloat16, {"L": TOKENS, "D": dim})
    for dim in (512, 1024, 2048)
]


def variants(case, mode, device):
    L, D = case.shape["L"], case.shape["D"]
    x = torch.randn(L, D, device=device, dtype=case.dtype)
    weight, bias = torch.randn(2, D, device=device, dtype=case.dtype)

    def rival(x, weight, bias):
        return functional.layer_norm(x, (D,), weight, bias, 1e-6)

    inputs = (x, weight, bias)
    found = {
        "ours": timed(layer_norm, inputs, mode),
        "torch layer_norm": timed(rival, inputs, mode),
    }
    if mode == "forward":
        found["ours, in fp8"] = lambda: layer_norm_fp8(*inputs)
        found["ours, in both"] = lambda: layer_norm_fp8(*inputs, keep=True)
    return found


def bytes_moved(case, mode):
    row = case.shape["D"] * case.dtype.itemsize
    return case.shape["L"] * row * (2 if mode == "forward" else 3)


def flops(case, mode):
    return 0
