"""Choose an implementation; never fall back in silence."""

import functools
import os
from enum import StrEnum

import torch
from torch import Tensor


class Impl(StrEnum):
    """Implementation of an operator."""

    AUTO = "auto"
    HOPPER = "hopper"
    """Kernels for compute capability 9.0, in Gluon; of the operators that have them."""
    TRITON = "triton"
    REFERENCE = "reference"


def resolve(
    impl: Impl | str, like: Tensor, *, not_hopper: str = "the operator has no Hopper kernel"
) -> Impl:
    """Return the implementation that will run.

    Args:
        impl: what the caller asked for. AUTO is HOPPER on a GPU of compute capability 9.0 where
            nothing speaks against it, else TRITON for a CUDA tensor (or under TRITON_INTERPRET=1),
            else the reference.
        like: a tensor on the device in question.
        not_hopper: why the operator's Hopper kernel cannot take this call; empty if it can.

    Raises:
        ValueError: if `impl` is unknown, or is HOPPER or TRITON where that cannot run.
    """
    try:
        impl = Impl(impl)
    except ValueError:
        raise ValueError(f"impl must be one of {[str(i) for i in Impl]}, got {impl!r}") from None
    on_hopper = like.is_cuda and is_hopper(like.device)
    if impl is Impl.HOPPER and (not_hopper or not on_hopper):
        why = (
            not_hopper or f"it needs tensors on a GPU of compute capability 9.0, got {like.device}"
        )
        raise ValueError(f"impl='hopper' cannot run: {why}; use impl='triton' or 'auto'")
    runs_triton = like.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    if impl is Impl.TRITON and not runs_triton:
        raise ValueError(
            f"impl='triton' needs CUDA tensors (or TRITON_INTERPRET=1), got {like.device}"
        )
    if impl is Impl.AUTO:
        if on_hopper and not not_hopper:
            return Impl.HOPPER
        return Impl.TRITON if runs_triton else Impl.REFERENCE
    return impl


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Return whether the device is a GPU of compute capability 9.0 (H100, H200)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
