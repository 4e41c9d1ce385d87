"""An HSTU layer as one operator: what it keeps for the backward pass is the caller's choice."""

from kernels.hstu_layer.op import hstu_layer, quantize_weights
from kernels.hstu_layer.structure import PRODUCTS, RECOMPUTABLE, Fp8Weights, LayerWeights

__all__ = [
    "PRODUCTS",
    "RECOMPUTABLE",
    "Fp8Weights",
    "LayerWeights",
    "hstu_layer",
    "quantize_weights",
]
