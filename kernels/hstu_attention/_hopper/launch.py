"""What the launchers share: tensors as the copy engine takes them, block sizes, constants."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

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
