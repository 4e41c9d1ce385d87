"""What the launchers share: tensors as the copy engine takes them, block sizes, constants."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.experimental.gluon.language as gl
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.hstu_attention._triton.mask import mask_constants
from kernels.hstu_attention.bias import time_thresholds
from kernels.hstu_attention.structure import Structure

DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}


def copyable(x: Tensor) -> Tensor:
    """Return x (rows, H, D), or a copy where the copy engine cannot read it in place.

    It wants heads side by side in a row, and rows that begin at multiples of 16 bytes.
    """
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    in_place = x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2]) and aligned
    return x if in_place else x.contiguous()


class Tiles(NamedTuple):
    """A tensor as the copy engine reads or writes it, in tiles of whole heads or parts of one."""

    base: Tensor
    shape: list[int]
    strides: list[int]
    block_shape: list[int]
    padding: str = "zero"

    def describe(self) -> TensorDescriptor:
        """Return what Gluon compiles for."""
        layout = gl.NVMMASharedLayout.get_default_for(self.block_shape, DTYPES[self.base.dtype])
        return TensorDescriptor(self.base, self.shape, self.strides, self.block_shape, layout)


def tiles(x: Tensor, rows: int, columns: int | None = None) -> Tiles:
    """Return x (rows, H, D), as `copyable` returns it, in tiles of `rows` rows and D columns."""
    shape = [x.shape[0], x.shape[1] * x.shape[2]]
    return Tiles(x, shape, [x.stride(0), 1], [rows, columns or x.shape[2]])


_compiled: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any, grid: tuple[int, int, int], arguments: Sequence[Any], constants: dict[str, Any]
) -> None:
    """Launch a kernel, compiled when called like this for the first time.

    Triton looks anew at each argument of each launch: with the descriptors of a backward pass that
    takes longer than the pass itself on 32 sequences of 1,024 (measured on one H100: 0.4 ms a
    forward pass of 0.08 ms).

    Args:
        kernel: of Gluon or Triton; its integers must not be specialised.
        grid: programs by axis.
        arguments: Tiles, tensors, numbers or None, in the order of its parameters.
        constants: the constexpr parameters, which come last, in their order.
    """
    key = (kernel, *map(_kind, arguments), *constants.values())
    compiled = _compiled.get(key)
    if compiled is None:
        assert list(constants) == kernel.arg_names[len(arguments) :]
        described = [x.describe() if isinstance(x, Tiles) else x for x in arguments]
        _compiled[key] = kernel[grid](*described, **constants, num_warps=4)
    else:
        compiled[grid](*arguments, *constants.values())


def _kind(x: Any) -> Any:
    """Return what a kernel is compiled for: dtype, tile, alignment, width."""
    if isinstance(x, Tiles):
        return (x.base.dtype, x.base.get_device(), *x.block_shape)
    if isinstance(x, Tensor):
        return x.dtype, x.get_device(), x.data_ptr() % 16 == 0
    if isinstance(x, int):
        return -(2**31) <= x < 2**31
    return type(x)


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
    """Return the kernel arguments position_ptr .. key_time_ptr, times relative and in int32."""
    if structure.time_table is None:
        return structure.position_table, None, None, None, None
    query_time, key_time = relative_times(structure)
    return (
        structure.position_table,
        structure.time_table,
        _thresholds(structure.time_table.numel() - 1, structure.offsets.device),
        query_time,
        key_time,
    )


TIME_LIMIT = 2**30 - 1
"""Seconds (34 years). Times relative to the newest key of the sequence are kept in int32; what lies
farther off counts as this far, so that every difference fits too."""


@triton.jit
def _relative_times_kernel(
    offsets_ptr, q_offsets_ptr, query_time_ptr, key_time_ptr, query_out_ptr, key_out_ptr,
    LIMIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start = tl.load(offsets_ptr + b)
    length = tl.load(offsets_ptr + b + 1) - start
    q_start = tl.load(q_offsets_ptr + b)
    q_length = tl.load(q_offsets_ptr + b + 1) - q_start
    newest = tl.load(key_time_ptr + start + length - 1, mask=length > 0, other=0)
    key = tl.load(key_time_ptr + start + at, mask=at < length, other=0) - newest
    key = tl.minimum(tl.maximum(key, -LIMIT), LIMIT).to(tl.int32)
    tl.store(key_out_ptr + start + at, key, mask=at < length)
    query = tl.load(query_time_ptr + q_start + at, mask=at < q_length, other=0) - newest
    query = tl.minimum(tl.maximum(query, -LIMIT), LIMIT).to(tl.int32)
    tl.store(query_out_ptr + q_start + at, query, mask=at < q_length)


def relative_times(structure: Structure) -> tuple[Tensor, Tensor]:
    """Return (R,) and (L,) int32 s: times of queries and keys since the newest key."""
    assert structure.query_time is not None
    assert structure.key_time is not None
    query, key = (
        torch.empty_like(x, dtype=torch.int32) for x in (structure.query_time, structure.key_time)
    )
    block = 1024
    grid = (structure.num_sequences, triton.cdiv(structure.max_len, block), 1)
    if grid[0] * grid[1]:
        arguments = (
            structure.offsets, structure.q_offsets, structure.query_time, structure.key_time,
            query, key,
        )  # fmt: skip
        launch(_relative_times_kernel, grid, arguments, {"LIMIT": TIME_LIMIT, "BLOCK": block})
    return query, key


@functools.cache
def _thresholds(num_buckets: int, device: torch.device) -> Tensor:
    """Return (max(T, 1),) int32 on the device, copied there once: a copy waits for the GPU."""
    seconds = [min(x, 2**31 - 1) for x in time_thresholds(num_buckets)]
    return torch.tensor(seconds or [2**31 - 1], dtype=torch.int32, device=device)


def kernel_constants(q: Tensor, structure: Structure) -> dict[str, Any]:
    """Return the compile-time constants that do not depend on block sizes."""
    position, time = structure.position_table, structure.time_table
    return {
        "REACH": 0 if position is None else position.numel() // 2,
        "NUM_BUCKETS": 0 if time is None else time.numel() - 1,
        "PADDED_BUCKETS": 32 if time is None else max(32, triton.next_power_of_2(time.numel() - 1)),
        "H": q.shape[1],
        **mask_constants(structure.mask),
    }
