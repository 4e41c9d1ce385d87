"""How row-wise kernels share out an (L, D) tensor: a few whole rows a program, all in registers."""

import torch

from kernels._triton.sizes import next_power_of_2

MAX_DIM = 16384
"""Widest row that one program holds."""


def check_rows(name: str, dtype: torch.dtype, columns: int) -> None:
    """Refuse what row-wise kernels do not hold.

    Raises:
        ValueError: naming the argument `name`, if a row is too wide or not of 16 or 32 bits.
    """
    if columns > MAX_DIM:
        raise ValueError(
            f"{name} has rows of {columns}, impl='triton' holds at most {MAX_DIM}: use "
            "impl='reference'"
        )
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"{name} must be float32, float16 or bfloat16 for impl='triton', got {dtype}: use "
            "impl='reference'"
        )


def forward_tile(dim: int) -> tuple[int, int, int]:
    """Return (rows, padded columns, warps) of a program that reads each row once.

    Measured on one H100 at dims 512, 1024 and 2048: 4096 elements a program and 16 a thread or more
    reach the bandwidth of a copy.
    """
    columns = next_power_of_2(dim)
    rows = max(1, 4096 // columns)
    return rows, columns, 4 if columns <= 2048 else min(16, columns // 512)


def backward_tile(dim: int) -> tuple[int, int, int, int]:
    """Return (rows, padded columns, warps, programs a processor) of one that also sums over rows.

    Smaller tiles than forward, since the sums stay in registers beside the row. The gated norm ran
    best like this on one H100 at dims 512, 1024 and 2048; 1 row of 512, or 2 rows of 2048 on 2
    warps, ran at half the bandwidth. Every program is resident at once: one more a processor would
    wait for a second wave (layer_norm at 2048 on one H200: 53 % of a copy's bandwidth).
    """
    columns = next_power_of_2(dim)
    if columns <= 512:
        return 2048 // columns, columns, 4, 3
    if columns <= 4096:
        return 4096 // columns, columns, 8, 2
    return 1, columns, 16, 1


def num_programs(device: torch.device, blocks: int, per_processor: int) -> int:
    """Return how many programs share `blocks` blocks of rows; each keeps one partial sum.

    A function of the device and the shape alone, so that sums come out the same in every run.
    """
    if device.type != "cuda":
        return min(blocks, 4)  # The interpreter: enough that programs take several blocks each.
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return min(blocks, per_processor * processors)
