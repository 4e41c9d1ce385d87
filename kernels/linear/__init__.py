"""Linear map with bias, SiLU or residual in its epilogue."""

from kernels.linear.op import linear

__all__ = ["linear"]
