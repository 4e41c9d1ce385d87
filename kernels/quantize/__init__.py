"""Row-wise quantisation to fp8."""

from kernels.quantize.op import quantize_rows

__all__ = ["quantize_rows"]
