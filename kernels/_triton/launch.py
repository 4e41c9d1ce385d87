"""Launches of kernels that take descriptors of tiles, without looking at each argument anew."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

DTYPES = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.float32: gl.float32,
    torch.float8_e4m3fn: gl.float8e4nv,
}


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


_compiled: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    arguments: Sequence[Any],
    constants: dict[str, Any],
    *,
    num_warps: int = 4,
) -> None:
    """Launch a kernel, compiled when called like this for the first time.

    Triton looks anew at each argument of each launch: with the descriptors of a backward pass that
    takes longer than the pass itself on 32 sequences of 1,024 (measured on one H100: 0.4 ms a
    forward pass of 0.08 ms).

    Args:
        kernel: of Gluon or Triton.
        grid: programs by axis.
        arguments: Tiles, tensors, numbers or None, in the order of its parameters.
        constants: the constexpr parameters, which come last, in their order.
        num_warps: of a program.
    """
    key = (kernel, num_warps, *map(_kind, arguments), *constants.values())
    compiled = _compiled.get(key)
    if compiled is None:
        assert list(constants) == kernel.arg_names[len(arguments) :]
        described = [x.describe() if isinstance(x, Tiles) else x for x in arguments]
        _compiled[key] = kernel[grid](*described, **constants, num_warps=num_warps)
    else:
        compiled[grid](*arguments, *constants.values())


def _kind(x: Any) -> Any:
    """Return what a kernel is compiled for: dtype, tile, alignment, width."""
    if isinstance(x, Tiles):
        return (x.base.dtype, x.base.get_device(), *x.block_shape)
    if isinstance(x, Tensor):
        return x.dtype, x.get_device(), x.data_ptr() % 16 == 0
    if isinstance(x, int):
        # Triton compiles anew for multiples of 16, and for 1, where it is not told otherwise.
        return -(2**31) <= x < 2**31, x % 16 == 0, x == 1
    return type(x)
