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


def assert_within_a_step(actual: Tensor, expected: Tensor) -> None:
    """Hold values to one step of their dtype.

    Two forms of a kernel (with and without a second output) need not add a row up in the same order
    on a GPU: what differs in the last digit of float32 may be rounded the other way.
    """
    assert actual.dtype == expected.dtype
    actual, exact = actual.double(), expected.double()
    largest = exact.abs().max() if exact.numel() else 0.0
    allowed = torch.finfo(expected.dtype).eps * exact.abs() + 1e-6 * largest
    assert bool(((actual - exact).abs() <= allowed).all())
