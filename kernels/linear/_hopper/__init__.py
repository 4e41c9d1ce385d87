"""Linear map for Hopper GPUs, in Gluon."""

from kernels.linear._hopper.forward import linear_fwd

__all__ = ["linear_fwd"]
