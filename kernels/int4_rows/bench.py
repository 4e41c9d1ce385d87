"""Rows from host memory to the GPU in 4 bits and in float16, read by the GPU or copied there."""

import torch

from kernels.bench import Case
from kernels.int4_rows import dequantize_int4, row_bytes

ROWS = 1_000_000
CASES = [
    Case(f"{n} of {ROWS} rows, D={dim}", torch.float16, {"R": n, "D": dim}, ("forward",))
    for dim in (128, 512)
    for n in (8192, 131072)
]


def _rows(case, device):
    """Return 4-bit rows, float16 rows, both in host memory, and an index without order."""
    generator = torch.Generator().manual_seed(0)
    on_gpu = device != "cpu"
    dim = case.shape["D"]
    packed = torch.randint(256, (ROWS, row_bytes(dim)), dtype=torch.uint8, generator=generator)
    constants = torch.tensor([0.01, -0.1], dtype=torch.float16)
    packed[:, -4:] = constants.view(torch.uint8)
    halves = torch.empty(ROWS, dim, dtype=torch.float16).uniform_(generator=generator)
    index = torch.randint(ROWS, (case.shape["R"],), generator=generator)
    if on_gpu:
        packed, halves = packed.pin_memory(), halves.pin_memory()
    return packed, halves, index


def variants(case, mode, device):
    packed, halves, index = _rows(case, device)
    index_gpu = index.to(device)

    def copied(rows):
        buffer = torch.empty(
            len(index), rows.shape[1], dtype=rows.dtype, pin_memory=device != "cpu"
        )
        torch.index_select(rows, 0, index, out=buffer)
        return buffer.to(device, non_blocking=True)

    return {
        "ours": lambda: dequantize_int4(packed, index_gpu, dtype=torch.float16),
        "4-bit, host copies": lambda: dequantize_int4(copied(packed), dtype=torch.float16),
        "float16, host copies": lambda: copied(halves),
    }


def bytes_moved(case, mode):
    n, dim = case.shape["R"], case.shape["D"]
    return n * (8 + row_bytes(dim) + 2 * dim)


def flops(case, mode):
    return 0
