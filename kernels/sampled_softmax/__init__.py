"""Softmax loss against sampled negatives that groups of rows share."""

from kernels.sampled_softmax.op import sampled_softmax

__all__ = ["sampled_softmax"]
