"""Launches of kernels that take descriptors of tiles, without looking at each argument anew."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
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
    round_f32_to_tf32: bool = False
    """Newer Tritons ask."""

    def describe(self) -> TensorDescriptor:
        """Return what Gluon compiles for."""
        layout = gl.NVMMASharedLayout.get_default_for(self.block_shape, DTYPES[self.base.dtype])
        return TensorDescriptor(self.base, self.shape, self.strides, self.block_shape, layout)


_compiled: dict[tuple[Any, ...], tuple[Any, Any]] = {}
"""By what a kernel was compiled for: the kernel, whose id the key holds, and what was compiled."""


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
    forward pass of 0.08 ms). And what it has compiled asks each tensor for its pointer, and the
    driver about each pointer, so it is given the numbers.

    Args:
        kernel: of Gluon or Triton.
        grid: programs by axis.
        arguments: Tiles, tensors, numbers or None, in the order of its parameters. Tensors are on
            one device.
        constants: the constexpr parameters, which come last, in their order.
        num_warps: of a program.
    """
    device: int | None = None
    kinds: list[Any] = [id(kernel), num_warps]
    values: list[Any] = []
    for x in arguments:
        if isinstance(x, Tensor):
            address = x.data_ptr()
            values.append(address)
            kinds += (x.dtype, address & 15 == 0)
            if device is None:
                device = x.get_device()
            continue
        values.append(x)
        if isinstance(x, Tiles):
            kinds += (x.base.dtype, *x.block_shape)
            if device is None:
                device = x.base.get_device()
        elif isinstance(x, int):
            # Triton compiles anew for multiples of 16, and for 1, where it is not told otherwise.
            kinds.append((-(2**31) <= x < 2**31) + 2 * (x & 15 == 0) + 4 * (x == 1))
        else:
            kinds.append(type(x))
    key = (device, *kinds, *constants.values())
    found = _compiled.get(key)
    if found is None:
        assert list(constants) == kernel.arg_names[len(arguments) :]
        described = [x.describe() if isinstance(x, Tiles) else x for x in arguments]
        compiled = kernel[grid](*described, **constants, num_warps=num_warps)
        if compiled is not None:  # the interpreter's is
            _compiled[key] = kernel, compiled
        return
    compiled = found[1]
    runtime = triton.knobs.runtime
    if runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls:
        compiled[grid](*arguments, *constants.values())  # a profiler is told of every launch
        return
    stream = triton.runtime.driver.active.get_current_stream(device)
    compiled.run(
        *grid,
        *(stream, compiled.function, compiled.packed_metadata, None, None, None),
        *values,
        *constants.values(),
    )
