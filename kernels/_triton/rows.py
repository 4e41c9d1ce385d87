"""How row-wise kernels share out an (L, D) tensor: a few whole rows a program, all in registers."""

import torch
import triton

MAX_DIM = 16384
"""Widest row that one program holds."""


def forward_tile(dim: int) -> tuple[int, int, int]:
    """Return (rows, padded columns, warps) of a program that reads each row once.

    Measured on one H100 at dims 512, 1024 and 2048: 4096 elements a program and 16 a thread or more
    reach the bandwidth of a copy.
    """
    columns = triton.next_power_of_2(dim)
    rows = max(1, 4096 // columns)
    return rows, columns, 4 if columns <= 2048 else min(16, columns // 512)


def backward_tile(dim: int) -> tuple[int, int, int]:
    """Return (rows, padded columns, warps) of a program that also sums over rows.

    Smaller tiles than forward: the sums stay in registers beside the row (1 row of 512 or 2 rows of
    2048 on 2 warps ran at half the bandwidth on one H100).
    """
    columns = triton.next_power_of_2(dim)
    rows = max(1, min(4, 8192 // columns))
    return rows, columns, min(16, max(4, rows * columns // 1024))


def num_programs(device: torch.device, blocks: int, per_processor: int = 3) -> int:
    """Return how many programs share `blocks` blocks of rows; each keeps one partial sum.

    A function of the device and the shape alone, so that sums come out the same in every run.
    """
    if device.type != "cuda":
        return min(blocks, 4)  # The interpreter: enough that programs take several blocks each.
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return min(blocks, per_processor * processors)
