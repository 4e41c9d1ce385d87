"""Gated norm against torch's layer norm and product, at the widths of the layer benchmarks."""

import torch
from torch.nn import functional

from kernels.bench import Case, timed
from kernels.norm_gate import norm_gate, norm_gate_fp8

TOKENS = 131072
CASES = [
    Case(f"L={TOKENS} C={dim}", torch.bfloat16, {"L": TOKENS, "C": dim})
    for dim in (512, 1024, 2048)
]


def variants(case, mode, device):
    L, C = case.shape["L"], case.shape["C"]
    x, u = torch.randn(2, L, C, device=device, dtype=case.dtype)
    weight, bias = torch.randn(2, C, device=device, dtype=case.dtype)

    def rival(x, u, weight, bias):
        return functional.layer_norm(x, (C,), weight, bias, 1e-6) * u

    def heads(x, u, weight, bias):
        return norm_gate(x, u, weight, bias, num_groups=4)

    def dropout(x, u, weight, bias):
        return norm_gate(x, u, weight, bias, dropout=0.2, seed=seed)

    seed = torch.tensor(1, device=device)
    inputs = (x, u, weight, bias)
    found = {
        "ours": timed(norm_gate, inputs, mode),
        "torch layer_norm * u": timed(rival, inputs, mode),
        "ours, norm of 4 heads": timed(heads, inputs, mode),
        "ours, dropout": timed(dropout, inputs, mode),
    }
    if mode == "forward":
        found["ours, in fp8"] = lambda: norm_gate_fp8(*inputs)
        found["ours, in both"] = lambda: norm_gate_fp8(*inputs, keep=True)
    return found


def bytes_moved(case, mode):
    row = case.shape["C"] * case.dtype.itemsize
    return case.shape["L"] * row * (3 if mode == "forward" else 5)


def flops(case, mode):
    return 0
