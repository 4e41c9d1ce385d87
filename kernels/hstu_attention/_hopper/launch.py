"""What the launchers share: tensors as the copy engine takes them, block sizes, constants."""

from typing import Any

import torch
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.hstu_attention._triton.launch import time_threshold_tensor
from kernels.hstu_attention._triton.mask import mask_constants
from kernels.hstu_attention.structure import Structure

DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}


def copyable(x: Tensor) -> Tensor:
    """Return x (rows, H, D), or a copy where the copy engine cannot read it in place.

    It wants heads side by side in a row, and rows that begin at multiples of 16 bytes.
    """
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    in_place = x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2]) and aligned
    return x if in_place else x.contiguous()


def descriptor(x: Tensor, rows: int, columns: int | None = None) -> TensorDescriptor:
    """Describe x (rows, H, D) to the copy engine in tiles of `rows` rows.

    Args:
        x: as `copyable` returns it.
        rows: of a tile.
        columns: of a tile; None means D.
    """
    shape = [x.shape[0], x.shape[1] * x.shape[2]]
    tile = [rows, columns or x.shape[2]]
    layout = gl.NVMMASharedLayout.get_default_for(tile, DTYPES[x.dtype])
    return TensorDescriptor(x, shape, [x.stride(0), 1], tile, layout)


def forward_blocks(K: int, V: int, *, bias: bool) -> dict[str, int]:
    """Return the keys of a block and the depth of the ring of the forward kernel."""
    if bias:
        # Gathers of 128 keys at once do not fit the registers (2000 bytes spilled).
        return {"BLOCK_N": 64, "STAGES": 2 if max(K, V) > 128 else 3}
    if max(K, V) <= 64:
        return {"BLOCK_N": 128, "STAGES": 3}
    if max(K, V) <= 128:
        return {"BLOCK_N": 128, "STAGES": 2}
    return {"BLOCK_N": 64, "STAGES": 2}


def table_inputs(structure: Structure) -> tuple[Tensor | None, ...]:
    """Return the kernel arguments position_ptr .. key_time_ptr."""
    return (
        structure.position_table,
        structure.time_table,
        time_threshold_tensor(structure),
        structure.query_time,
        structure.key_time,
    )


def kernel_constants(q: Tensor, structure: Structure) -> dict[str, Any]:
    """Return the compile-time constants that do not depend on block sizes."""
    position, time = structure.position_table, structure.time_table
    return {
        "REACH": 0 if position is None else position.numel() // 2,
        "NUM_BUCKETS": 0 if time is None else time.numel() - 1,
        "H": q.shape[1],
        **mask_constants(structure.mask),
    }
