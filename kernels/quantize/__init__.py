"""Row-wise quantisation to fp8, and its transposition."""

from kernels.quantize.op import quantize_rows, transpose_rows
from kernels.quantize.reference import QuantizedRows

__all__ = ["QuantizedRows", "quantize_rows", "transpose_rows"]
