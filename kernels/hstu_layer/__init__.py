"""An HSTU layer as one operator: what it keeps for the backward pass is the caller's choice."""

from kernels.hstu_layer.inference import Attend, hstu_layer_around, inference_weights
from kernels.hstu_layer.op import hstu_layer, quantize_weights
from kernels.hstu_layer.structure import (
    PRODUCTS,
    RECOMPUTABLE,
    RECOMPUTED,
    Fp8Weights,
    LayerWeights,
)

__all__ = [
    "PRODUCTS",
    "RECOMPUTABLE",
    "RECOMPUTED",
    "Attend",
    "Fp8Weights",
    "LayerWeights",
    "hstu_layer",
    "hstu_layer_around",
    "inference_weights",
    "quantize_weights",
]
