"""The two projections of an HSTU layer against torch's separate operators."""

import torch
from torch.nn import functional

from kernels.bench import Case, timed
from kernels.linear import linear

TOKENS = 131072
CASES = [
    Case(f"{name} d={dim}", torch.bfloat16, {"L": TOKENS, "D": dim, "F": factor * dim})
    for name, factor in (("UVQK silu", 4), ("output residual", 1))
    for dim in (512, 1024, 2048)
] + [Case("UVQK silu d=512", torch.float32, {"L": TOKENS, "D": 512, "F": 2048})]


def variants(case, mode, device):
    L, D, F = (case.shape[key] for key in "LDF")
    x = torch.randn(L, D, device=device, dtype=case.dtype)
    weight = torch.randn(F, D, device=device, dtype=case.dtype) / D**0.5
    bias = torch.randn(F, device=device, dtype=case.dtype)
    if case.name.startswith("UVQK"):
        inputs = (x, weight, bias)
        kept = weight.detach().requires_grad_()
        found = {
            "ours": timed(lambda *a: linear(*a, activation="silu"), inputs, mode),
            "torch linear, silu": timed(
                lambda *a: functional.silu(functional.linear(*a)), inputs, mode
            ),
        }
        if mode == "forward":
            found["ours, z kept"] = lambda: linear(x, kept, bias, activation="silu")
            found["torch linear alone"] = timed(functional.linear, inputs, mode)
        return found
    inputs = (x, weight, bias, torch.randn(L, F, device=device, dtype=case.dtype))
    found = {
        "ours": timed(lambda x, w, b, r: linear(x, w, b, residual_LF=r), inputs, mode),
        "torch linear + residual": timed(
            lambda x, w, b, r: functional.linear(x, w, b) + r, inputs, mode
        ),
    }
    if mode == "forward":
        found["torch addmm"] = lambda: torch.addmm(inputs[3], x, weight.T)
    return found


def bytes_moved(case, mode):
    L, D, F = (case.shape[key] for key in "LDF")
    has_residual = case.name.startswith("output")
    forward = L * (D + F * (2 if has_residual else 1)) + F * D
    # Backward: dy, z and x are read, dx is written.
    backward = L * (2 * D + F * (1 if has_residual else 2)) + 2 * F * D
    return (forward if mode == "forward" else backward) * case.dtype.itemsize


def flops(case, mode):
    L, D, F = (case.shape[key] for key in "LDF")
    return 2 * L * D * F * (1 if mode == "forward" else 2)
