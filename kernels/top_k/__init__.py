"""The k items with the largest dot products, of a whole catalogue, exactly."""

from kernels.top_k.op import TopK, top_k

__all__ = ["TopK", "top_k"]
