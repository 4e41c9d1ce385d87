"""The two projections of an HSTU layer against torch's separate operators, and fp8 against bf16.

The fp8 cases time one training step of a projection with its producer: the norm before it, the
product with its epilogue, the backward pass of SiLU, both gradients, and all quantisation, that of
the weight included. The bf16 rival is made of this project's own fused operators.
"""

import functools

import torch
from torch.nn import functional

from kernels.bench import Case, timed
from kernels.layer_norm import layer_norm, layer_norm_fp8
from kernels.linear import (
    faster_wgrad,
    forward_keeping,
    linear,
    linear_fp8_dgrad,
    linear_fp8_forward,
    linear_fp8_wgrad,
    quantize_weight,
    silu_backward,
    silu_backward_fp8,
)
from kernels.norm_gate import norm_gate, norm_gate_fp8
from kernels.quantize import quantize_rows

TOKENS = 131072
DIMS = (512, 1024, 2048)
PROJECTIONS = (("UVQK silu", 4), ("output residual", 1))
CASES = [
    *[
        Case(f"{name} d={dim}", torch.bfloat16, {"L": TOKENS, "D": dim, "F": factor * dim})
        for name, factor in PROJECTIONS
        for dim in DIMS
    ],
    Case("UVQK silu d=512", torch.float32, {"L": TOKENS, "D": 512, "F": 2048}),
    *[
        Case(
            f"fp8 {name} d={dim}",
            torch.bfloat16,
            {"L": TOKENS, "D": dim, "F": factor * dim},
            ("both",),
        )
        for name, factor in PROJECTIONS
        for dim in DIMS
    ],
]


def variants(case, mode, device):
    L, D, F = (case.shape[key] for key in "LDF")
    x = torch.randn(L, D, device=device, dtype=case.dtype)
    weight = torch.randn(F, D, device=device, dtype=case.dtype) / D**0.5
    bias = torch.randn(F, device=device, dtype=case.dtype)
    if mode == "both":
        # Gradients of tokens differ in size.
        dy = torch.randn(L, F, device=device) * torch.randn(L, 1, device=device).exp()
        step = _uvqk if "UVQK" in case.name else _output
        return _captured(step(x, weight, bias, dy.to(case.dtype)))
    if case.name.startswith("UVQK"):
        inputs = (x, weight, bias)
        found = {
            "ours": timed(lambda *a: linear(*a, activation="silu"), inputs, mode),
            "torch linear, silu": timed(
                lambda *a: functional.silu(functional.linear(*a)), inputs, mode
            ),
        }
        if mode == "forward":
            kept = weight.detach().requires_grad_()
            found["ours, z kept"] = lambda: linear(x, kept, bias, activation="silu")
            found["plain Triton"] = lambda: linear(
                x, weight, bias, activation="silu", impl="triton" if x.is_cuda else "auto"
            )
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
        found["torch linear alone"] = lambda: functional.linear(x, weight, bias)
    return found


def _captured(calls):
    """Return the calls as CUDA graphs: a step is a dozen launches, whose host time is not meant."""
    if not torch.cuda.is_available():
        return calls
    pool = torch.cuda.graph_pool_handle()
    graphs = {}
    for name, call in calls.items():
        call()  # Compiles.
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name], pool=pool):
            call()
    return {name: graph.replay for name, graph in graphs.items()}


def _scaled_mm(a, b):
    """torch's product of quantised rows, as fast as it will."""
    return torch._scaled_mm(
        a.values,
        b.values.T,
        a.scale[:, None],
        b.scale[None, :],
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def _fp8_gradients(dz, dz_bf16, transposed, rows, x, weight, wgrad):
    """Return dx and dW from dz in fp8, and in 16 bits where dW is computed in them."""
    dx = linear_fp8_dgrad(dz, weight.columns)
    if wgrad == "bf16":
        return dx, dz_bf16.T @ x
    return dx, linear_fp8_wgrad(dz, rows, transposed=transposed).to(torch.bfloat16)


def _uvqk(x, weight, bias, dy):
    F = weight.shape[0]
    norm = torch.randn(2, x.shape[1], device=x.device, dtype=x.dtype)

    def fp8(wgrad):
        in_bf16 = wgrad == "bf16"
        normed = layer_norm_fp8(x, *norm, keep=in_bf16)
        kept = quantize_weight(weight)
        y, z = linear_fp8_forward(normed.rows, kept.rows, bias, silu_columns=F, keep=True)
        dz = silu_backward_fp8(dy, z, silu_columns=F, keep=in_bf16, transpose=wgrad == "fold")
        gradients = (dz.rows, dz.dz, dz.transposed)
        return y, _fp8_gradients(*gradients, normed.rows, normed.y, kept, wgrad)

    def bf16():
        normed = layer_norm(x, *norm)
        y, z = forward_keeping(normed, weight, bias, silu_columns=F)
        dz, _ = silu_backward(dy, z, silu_columns=F)
        return y, dz @ weight, dz.T @ normed

    def scaled_mm():
        normed = layer_norm(x, *norm)
        rows, kept = quantize_rows(normed), quantize_weight(weight)
        z = _scaled_mm(rows, kept.rows) + bias
        y = functional.silu(z)
        dz, _ = silu_backward(dy, z, silu_columns=F)
        return y, _scaled_mm(quantize_rows(dz), kept.columns), dz.T @ normed

    return _by_wgrad(fp8, weight, has_silu=True) | {
        "bf16": bf16,
        "torch _scaled_mm, separate passes, bf16 wgrad": scaled_mm,
    }


def _output(x, weight, bias, dy):
    u, residual = torch.randn(2, *x.shape, device=x.device, dtype=x.dtype)
    norm = torch.randn(2, x.shape[1], device=x.device, dtype=x.dtype)

    def fp8(wgrad):
        normed = norm_gate_fp8(x, u, *norm, keep=wgrad == "bf16")
        kept = quantize_weight(weight)
        y, _ = linear_fp8_forward(normed.rows, kept.rows, bias, residual)
        gradients = (quantize_rows(dy), dy, None)
        return y, _fp8_gradients(*gradients, normed.rows, normed.out, kept, wgrad)

    def bf16():
        normed = norm_gate(x, u, *norm)
        y = linear(normed, weight, bias, residual_LF=residual)
        return y, dy @ weight, dy.T @ normed

    def scaled_mm():
        normed = norm_gate(x, u, *norm)
        rows, kept = quantize_rows(normed), quantize_weight(weight)
        y = _scaled_mm(rows, kept.rows) + bias + residual
        return y, _scaled_mm(quantize_rows(dy), kept.columns), dy.T @ normed

    return _by_wgrad(fp8, weight, has_silu=False) | {
        "bf16": bf16,
        "torch _scaled_mm, separate passes, bf16 wgrad": scaled_mm,
    }


def _by_wgrad(fp8, weight, *, has_silu):
    chosen = faster_wgrad(*weight.shape, weight.device, has_silu=has_silu)
    other = "bf16" if chosen == "fold" else "fold"
    found = {
        "ours": functools.partial(fp8, chosen),
        f"ours, wgrad {other}": functools.partial(fp8, other),
    }
    if has_silu:
        found["ours, fold, transposed apart"] = functools.partial(fp8, "fold, apart")
    return found


def bytes_moved(case, mode):
    L, D, F = (case.shape[key] for key in "LDF")
    has_residual = "output" in case.name
    forward = L * (D + F * (2 if has_residual else 1)) + F * D
    # Backward: dy, z and x are read, dx is written.
    backward = L * (2 * D + F * (1 if has_residual else 2)) + 2 * F * D
    moved = {"forward": forward, "backward": backward, "both": forward + backward}
    return moved[mode] * case.dtype.itemsize


def flops(case, mode):
    L, D, F = (case.shape[key] for key in "LDF")
    return 2 * L * D * F * {"forward": 1, "backward": 2, "both": 3}[mode]
