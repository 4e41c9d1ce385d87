"""What the launchers share: tensors as the copy engine takes them, block sizes, constants."""

from typing import Any

from torch import Tensor

from kernels._triton.launch import Tiles
from kernels.hstu_attention._triton.mask import mask_constants
from kernels.hstu_attention.structure import Structure


def copyable(x: Tensor) -> Tensor:
    """Return x (rows, H, D), or a copy where the copy engine cannot read it in place.

    It wants heads side by side in a row, and rows that begin at multiples of 16 bytes.
    """
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    in_place = x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2]) and aligned
    return x if in_place else x.contiguous()


def tiles(x: Tensor, rows: int, columns: int | None = None) -> Tiles:
    """Return x (rows, H, D), as `copyable` returns it, in tiles of `rows` rows and D columns."""
    shape = [x.shape[0], x.shape[1] * x.shape[2]]
    return Tiles(x, shape, [x.stride(0), 1], [rows, columns or x.shape[2]])


def forward_blocks(K: int, V: int, *, time: bool) -> dict[str, int]:
    """Return the keys of a block and the depth of the ring of the forward kernel."""
    if time:
        # Two more tiles of 128 keys do not fit the registers.
        return {"BLOCK_N": 64, "STAGES": 2 if max(K, V) > 128 else 3}
    if max(K, V) <= 64:
        return {"BLOCK_N": 128, "STAGES": 3}
    if max(K, V) <= 128:
        return {"BLOCK_N": 128, "STAGES": 2}
    return {"BLOCK_N": 64, "STAGES": 2}


def kernel_constants(q: Tensor, structure: Structure) -> dict[str, Any]:
    """Return the compile-time constants that do not depend on block sizes."""
    time = structure.time_table
    return {
        "NUM_BUCKETS": 0 if time is None else time.numel() - 1,
        "H": q.shape[1],
        **mask_constants(structure.mask),
    }
