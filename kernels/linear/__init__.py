"""Linear map with bias, SiLU or residual in its epilogue; in 16 bits and in fp8."""

from kernels.linear.fp8 import (
    SiluBackwardFp8,
    faster_wgrad,
    linear_fp8,
    linear_fp8_dgrad,
    linear_fp8_forward,
    linear_fp8_wgrad,
    silu_backward_fp8,
)
from kernels.linear.op import forward_keeping, linear, silu_backward
from kernels.linear.weight import QuantizedWeight, quantize_weight

__all__ = [
    "QuantizedWeight",
    "SiluBackwardFp8",
    "faster_wgrad",
    "forward_keeping",
    "linear",
    "linear_fp8",
    "linear_fp8_dgrad",
    "linear_fp8_forward",
    "linear_fp8_wgrad",
    "quantize_weight",
    "silu_backward",
    "silu_backward_fp8",
]
