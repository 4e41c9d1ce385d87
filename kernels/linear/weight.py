"""A weight in fp8, in the two forms that products read."""

from typing import NamedTuple

from torch import Tensor

from kernels.dispatch import Impl
from kernels.quantize import QuantizedRows, quantize_rows


class QuantizedWeight(NamedTuple):
    """A weight (F, D) in fp8 twice, for the two products that read it: made once a step."""

    rows: QuantizedRows
    """Of the weight: values (F, D), a scale for each of its rows."""
    columns: QuantizedRows
    """Of its transpose: values (D, F), a scale for each of its columns."""


def quantize_weight(weight_FD: Tensor, *, impl: Impl | str = Impl.AUTO) -> QuantizedWeight:
    """Return a weight in fp8, by rows and by columns; once a step will do. Not differentiable.

    Args:
        weight_FD: (F, D) float32, float16 or bfloat16.
        impl: which implementation runs. All give the same bits.

    Raises:
        ValueError: as quantize_rows.
    """
    weight_FD = weight_FD.detach()
    return QuantizedWeight(
        quantize_rows(weight_FD, impl=impl), quantize_rows(weight_FD.T, impl=impl)
    )
