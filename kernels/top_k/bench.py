"""Exact top-k over a catalogue against torch's product and topk of chunks."""

import torch

from kernels.bench import Case
from kernels.top_k import top_k

CASES = [
    Case(
        f"E={items} D=128 Q={queries} k=200",
        dtype,
        {"E": items, "D": 128, "Q": queries, "k": 200},
        ("forward",),
    )
    for items, queries, dtype in (
        (10_000_000, 64, torch.bfloat16),
        (10_000_000, 64, torch.float16),
        (10_000_000, 1, torch.bfloat16),
        (1_000_000, 64, torch.bfloat16),
        (10_000_000, 64, torch.float32),
    )
]


def variants(case, mode, device):
    items = torch.randn(case.shape["E"], case.shape["D"], device=device, dtype=case.dtype)
    queries = torch.randn(case.shape["Q"], case.shape["D"], device=device, dtype=case.dtype)
    k = case.shape["k"]

    def chunked():
        best, rows = [], []
        for first in range(0, len(items), 1 << 20):
            found = (queries @ items[first : first + (1 << 20)].T).topk(k)
            best.append(found.values)
            rows.append(found.indices + first)
        values = torch.cat(best, 1).topk(k)
        return values.values, torch.cat(rows, 1).gather(1, values.indices)

    return {
        "ours": lambda: top_k(queries, items, k),
        # Of bf16 items its scores are bf16: fewer bytes, and not exact.
        "torch, chunks": chunked,
    }


def bytes_moved(case, mode):
    return case.shape["E"] * case.shape["D"] * case.dtype.itemsize


def flops(case, mode):
    return 2 * case.shape["E"] * case.shape["D"] * case.shape["Q"]
