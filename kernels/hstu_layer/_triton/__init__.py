"""Element-wise kernels of the layer: SiLU and its gradient, on views of its buffers."""

from kernels.hstu_layer._triton.silu import silu_bwd, silu_fwd
from kernels.hstu_layer._triton.silu_fp8 import silu_bwd_fp8

__all__ = ["silu_bwd", "silu_bwd_fp8", "silu_fwd"]
