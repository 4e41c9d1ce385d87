"""Linear map in plain Triton, for every GPU and for the interpreter."""

from kernels.linear._triton.linear import linear_fwd, silu_bwd

__all__ = ["linear_fwd", "silu_bwd"]
