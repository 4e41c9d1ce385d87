"""HSTU attention in Triton. No atomics: the same input gives the same bits.

Tiles are read by pointer, each row under the bounds of its own sequence, so that whatever a
neighbour holds (NaN included) never enters; the strides of q, k and v are free but for the last.

Source: the algorithm of FlashAttention-2 (arXiv 2307.08691), with two backward passes (dQ by query
block, dK and dV by key block) and SiLU weights, which need no running maximum.
"""

from kernels.hstu_attention._triton.backward import hstu_attention_bwd
from kernels.hstu_attention._triton.bias_gradient import bias_gradient
from kernels.hstu_attention._triton.forward import hstu_attention_fwd

__all__ = ["bias_gradient", "hstu_attention_bwd", "hstu_attention_fwd"]
