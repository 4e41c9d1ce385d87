"""An HSTU layer as one operator: what it keeps for the backward pass is the caller's choice."""

from kernels.hstu_layer.op import hstu_layer
from kernels.hstu_layer.structure import RECOMPUTABLE, LayerWeights

__all__ = ["RECOMPUTABLE", "LayerWeights", "hstu_layer"]
