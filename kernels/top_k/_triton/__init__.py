"""Exact top-k in Triton."""

from kernels.top_k._triton.search import top_k

__all__ = ["top_k"]
