"""Layer norm over the last dim."""

from kernels.layer_norm.op import LayerNormFp8, layer_norm, layer_norm_backward, layer_norm_fp8

__all__ = ["LayerNormFp8", "layer_norm", "layer_norm_backward", "layer_norm_fp8"]
