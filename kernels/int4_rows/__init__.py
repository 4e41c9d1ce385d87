"""Rows of embedding tables in 4 bits: read where they lie, and made floating."""

from kernels.int4_rows.op import dequantize_int4
from kernels.int4_rows.reference import row_bytes

__all__ = ["dequantize_int4", "row_bytes"]
