"""HSTU attention for Hopper GPUs, in Gluon: SiLU weights, bfloat16 and float16.

Tiles come by the copy engine into rings in shared memory; a producer warp fills them for two warp
groups that multiply. What is visible is decided by the same code as in the Triton kernels
(_triton/mask.py). Rows past the end of a sequence are read as zeros from a copy (prepare.py), so
that whatever a neighbour holds (NaN included) never enters.

Source: warp roles and their taking turns as in FlashAttention-3 (arXiv 2407.08608), without its
running maximum, which SiLU weights do not need.
"""

from kernels.hstu_attention._hopper.backward import hstu_attention_bwd
from kernels.hstu_attention._hopper.forward import hstu_attention_fwd
from kernels.hstu_attention._hopper.launch import copyable

__all__ = ["copyable", "hstu_attention_bwd", "hstu_attention_fwd"]
