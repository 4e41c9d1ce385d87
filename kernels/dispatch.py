"""Choose an implementation; never fall back in silence."""

import os
from enum import StrEnum

from torch import Tensor


class Impl(StrEnum):
    """Implementation of an operator."""

    AUTO = "auto"
    TRITON = "triton"
    REFERENCE = "reference"


def resolve(impl: Impl | str, like: Tensor) -> Impl:
    """Return the implementation that will run.

    Args:
        impl: what the caller asked for. AUTO is Triton for a CUDA tensor (or under
            TRITON_INTERPRET=1), else the reference.
        like: a tensor on the device in question.

    Raises:
        ValueError: if `impl` is unknown, or is TRITON where Triton cannot run.
    """
    try:
        impl = Impl(impl)
    except ValueError:
        raise ValueError(f"impl must be one of {[str(i) for i in Impl]}, got {impl!r}") from None
    runs_triton = like.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    if impl is Impl.TRITON and not runs_triton:
        raise ValueError(
            f"impl='triton' needs CUDA tensors (or TRITON_INTERPRET=1), got {like.device}"
        )
    if impl is Impl.AUTO:
        return Impl.TRITON if runs_triton else Impl.REFERENCE
    return impl
