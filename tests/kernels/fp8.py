"""What rows rounded to fp8 may differ by from the numbers that they stand for."""

import torch
from torch import Tensor

from kernels.quantize import QuantizedRows

FP8_CHECKS = ("test_autograd_registration", "test_faketensor")
"""What opcheck can do with fp8: its test of the schema compares, which torch cannot on the CPU."""


def assert_rounded(rows: QuantizedRows, exact: Tensor, *, error: Tensor | float) -> None:
    """Hold rows to half a step of e4m3, and their scale to the smallest that holds them.

    Args:
        rows: what a kernel gives.
        exact: (L, D) float64, finite.
        error: what the numbers themselves may be off by, before they are rounded.
    """
    assert rows.values.dtype == torch.float8_e4m3fn
    scale = rows.scale.double()[:, None]
    found = rows.values.double() * scale
    allowed = exact.abs() * 2**-4 + scale * 2**-10 + error
    assert bool(((found - exact).abs() <= allowed).all())
    largest = rows.values.double().abs().amax(1)[exact.abs().amax(1) > 1e-12]
    # In (224, 448], but for rounding to the nearest.
    assert bool(((largest >= 224) & (largest <= 448)).all())
