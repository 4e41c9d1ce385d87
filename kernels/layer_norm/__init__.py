"""Layer norm over the last dim."""

from kernels.layer_norm.op import layer_norm

__all__ = ["layer_norm"]
