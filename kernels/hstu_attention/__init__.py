"""Attention over jagged sequences: pointwise SiLU or softmax, masked, with relative bias."""

from kernels.hstu_attention.bias import RelativeBias
from kernels.hstu_attention.cached import CachedKeys, hstu_attention_cached
from kernels.hstu_attention.mask import AttentionMask
from kernels.hstu_attention.op import hstu_attention

__all__ = [
    "AttentionMask",
    "CachedKeys",
    "RelativeBias",
    "hstu_attention",
    "hstu_attention_cached",
]
