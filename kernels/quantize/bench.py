"""Row-wise quantisation against torch's separate operators, and transposition of the bytes."""

import torch

from kernels.bench import Case, timed
from kernels.quantize import quantize_rows, transpose_rows

TOKENS = 131072
CASES = [
    Case(f"L={TOKENS} D={dim}", torch.bfloat16, {"L": TOKENS, "D": dim}, ("forward",))
    for dim in (512, 1024, 2048, 4096)
] + [
    Case(f"transpose L={TOKENS} D={dim}", torch.bfloat16, {"L": TOKENS, "D": dim}, ("forward",))
    for dim in (512, 2048, 8192)
]


def variants(case, mode, device):
    x = torch.randn(case.shape["L"], case.shape["D"], device=device, dtype=case.dtype)

    if case.name.startswith("transpose"):
        values, scale = quantize_rows(x)
        return {
            "ours": lambda: transpose_rows(values),
            "torch": lambda: values.view(torch.uint8).T.contiguous(),
            "ours, times a factor": lambda: transpose_rows(values, scale),
        }

    def torch_ops(x):
        return quantize_rows(x, impl="reference")

    return {"ours": timed(quantize_rows, (x,), mode), "torch": timed(torch_ops, (x,), mode)}


def bytes_moved(case, mode):
    if case.name.startswith("transpose"):
        return 2 * case.shape["L"] * case.shape["D"]
    return case.shape["L"] * (case.shape["D"] * (case.dtype.itemsize + 1) + 4)


def flops(case, mode):
    return 0
